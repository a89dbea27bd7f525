"""A model's routing profile: how often each expert was needed, over all the time that the model was served."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm.models.files import write_atomic
from edgellm.moe.layout import ExpertLayout

Profile = npt.NDArray[np.uint64]

_log = logging.getLogger(__name__)


def read_profile(path: Path, layout: ExpertLayout) -> Profile:
    """(layers, experts): counts. Zeros if there is no file, or none of this shape."""
    shape = (layout.layers, layout.experts)
    try:
        with path.open("rb") as file:
            counts = np.load(file, allow_pickle=False)
        if counts.shape == shape and counts.dtype == np.uint64:
            return np.asarray(counts, np.uint64)
        _log.warning("%s is the profile of another model; it is begun anew", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError) as error:
        _log.warning("%s cannot be read and is begun anew: %s", path, error)
    return np.zeros(shape, np.uint64)


def write_profile(path: Path, counts: Profile) -> None:
    """In one step. A profile that cannot be written is logged: it is a help, not a need."""
    buffer = io.BytesIO()
    np.save(buffer, counts, allow_pickle=False)
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        _log.warning("the routing profile %s cannot be written: %s", path, error)


def hottest(counts: Profile, layout: ExpertLayout, slots: Sequence[int]) -> list[list[int]]:
    """(layers,): the experts that fill `slots[pool]`, the hottest of each layer first."""
    chosen: list[list[int]] = [[] for _ in range(layout.layers)]
    for pool, count in enumerate(slots):
        layers = [layer for layer in range(layout.layers) if layout.pools[layer] == pool]
        heat = counts[layers].ravel()
        for index in np.argsort(-heat.astype(np.float64), kind="stable")[:count]:
            chosen[layers[int(index) // layout.experts]].append(int(index) % layout.experts)
    return chosen


def expected_hit_rate(counts: Profile, layout: ExpertLayout, slots: Sequence[int]) -> float | None:
    """The share of needs that the hottest experts cover: what the budget gives at least, if routing stays as it was.

    None without a profile.
    """
    total = int(counts.sum())
    if not total:
        return None
    held = hottest(counts, layout, slots)
    return sum(int(counts[layer, experts].sum()) for layer, experts in enumerate(held)) / total
