"""A model's routing profile: how often each expert was needed, over all the time that the model was served."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm.moe.arrays import read_array, write_array
from edgellm.moe.layout import ExpertLayout

Profile = npt.NDArray[np.uint64]

_log = logging.getLogger(__name__)


def read_profile(path: Path, layout: ExpertLayout) -> Profile:
    """(layers, experts): counts. Zeros if there is no file, or none of this shape."""
    shape = (layout.layers, layout.experts)
    found = read_array(path, shape, np.uint64)
    return np.zeros(shape, np.uint64) if found is None else found


def write_profile(path: Path, counts: Profile) -> None:
    """In one step. A profile that cannot be written is logged: it is a help, not a need.

    Where the folder was removed, with the copy of a model's earlier state, nothing is written.
    """
    try:
        write_array(path, counts)
    except FileNotFoundError:
        _log.debug("%s: the folder was removed, and the routing profile with it", path)
    except OSError as error:
        _log.warning("the routing profile %s cannot be written: %s", path, error)


def hottest(counts: Profile, layout: ExpertLayout, slots: Sequence[int]) -> list[list[int]]:
    """(layers,): the experts that fill `slots[pool]`, the hottest of each layer first.

    Experts that were never needed only where there is room for all: elsewhere the slots are left to what is needed.
    """
    chosen: list[list[int]] = [[] for _ in range(layout.layers)]
    for pool, count in enumerate(slots):
        layers = [layer for layer in range(layout.layers) if layout.pools[layer] == pool]
        heat = counts[layers].ravel()
        known = count if count >= heat.size else min(count, int(np.count_nonzero(heat)))
        for index in np.argsort(-heat.astype(np.float64), kind="stable")[:known]:
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
