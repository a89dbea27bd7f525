"""Measures what narrowing a model's experts does to it, and chooses their widths (edgellm moe pack --loss-target)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm.backend.experts import Slice
from edgellm.backend.narrow import can_narrow, narrow_errors, narrow_size
from edgellm.errors import ConfigError, ExpertReadError, ModelUnsupportedError
from edgellm.moe.layout import ExpertLayout
from edgellm.moe.pager import load_paged
from edgellm.moe.perplexity import WINDOW, Perplexity, perplexity
from edgellm.moe.recorder import steps_in
from edgellm.moe.widths import MEASUREMENTS, Choice, Experts, Progress, Widths, choose_widths

OFFERED_BITS = (2, 3, 4, 6)
"""Widths to choose from, where they are narrower than the tensor's own codes."""

_USAGE_TOKENS = 4 * WINDOW  # that are read to learn how often each expert is used


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how a model is measured: a budget for its experts, threads, and the state directory."""

    layout: ExpertLayout
    budget_bytes: int
    home: Path
    threads: int

    def tokens(self, text: str) -> list[int]:
        """The text in the model's tokens."""
        with contextlib.closing(load_paged(self.layout, self.budget_bytes, self.home)) as model:
            return model.vocab.tokenize(text, add_special=False, parse_special=False)

    def perplexity(self, tokens: Sequence[int], widths: Widths | None = None) -> Perplexity:
        """On whole windows of (tokens,), with experts narrowed to `widths`, (layers, experts)."""
        model = load_paged(self.layout, self.budget_bytes, self.home, trial_widths=widths)
        with contextlib.closing(model):
            return perplexity(model, tokens, threads=self.threads)

    def usage(self, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
        """(layers, experts): how many of the first 2,048 of (tokens,) each expert is used for."""
        tokens = tokens[:_USAGE_TOKENS]
        counts = np.zeros((self.layout.layers, self.layout.experts))
        with contextlib.closing(load_paged(self.layout, self.budget_bytes, self.home)) as model:
            store = model.experts
            if store is None:
                raise ModelUnsupportedError(f"{self.layout.name} is not paged")
            store.log_routes(True)
            for start in range(0, len(tokens) - WINDOW + 1, WINDOW):
                perplexity(model, tokens[start : start + WINDOW], threads=self.threads)
                for step in steps_in(store.take_log(), self.layout.layers):
                    for layer, experts in enumerate(step.experts):
                        counts[layer, list(experts)] += 1
        return counts


def choose(
    bench: Bench,
    tokens: Sequence[int],
    usage: npt.NDArray[np.float64],
    *,
    loss_target: float,
    measurements: int = MEASUREMENTS,
    progress: Progress | None = None,
) -> Choice:
    """Widths with which the perplexity on (tokens,) is at most `loss_target` (0.02: 2 %) above the model's own.

    `usage` is what `Bench.usage` gave for them. Raises ConfigError if there are too few tokens or measurements,
    ModelUnsupportedError if no expert's type can be narrowed, ExpertReadError, and what `load_paged` raises.
    """
    if len(tokens) < WINDOW:
        raise ConfigError(f"the text has {len(tokens)} tokens, fewer than one window of {WINDOW}")
    experts = _experts(bench.layout, usage)

    def measure(widths: Widths) -> float:
        return bench.perplexity(tokens, widths).value

    return choose_widths(experts, measure, loss_target=loss_target, measurements=measurements, progress=progress)


def _experts(layout: ExpertLayout, usage: npt.NDArray[np.float64]) -> Experts:
    bits = tuple(bits for bits in OFFERED_BITS if any(can_narrow(piece.type, bits) for piece in layout.slices))
    if not bits:
        types = ", ".join(sorted({piece.type_name for piece in layout.slices}))
        raise ModelUnsupportedError(f"{layout.name}: experts of type {types} cannot be narrowed")
    pieces = [[piece for piece in layout.slices if piece.layer == layer] for layer in range(layout.layers)]
    return Experts(
        bits=bits,
        full_bytes=tuple(sum(piece.n_bytes for piece in layer) for layer in pieces),
        narrow_bytes=tuple(tuple(sum(_size(piece, width) for piece in layer) for width in bits) for layer in pieces),
        errors=_errors(layout, bits),
        usage=usage,
    )


def _size(piece: Slice, bits: int) -> int:
    return narrow_size(piece.type, piece.columns, piece.rows, bits) if can_narrow(piece.type, bits) else piece.n_bytes


def _errors(layout: ExpertLayout, bits: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """(layers, experts, widths): squared error over squared norm, the mean over an expert's weights."""
    errors = np.zeros((layout.layers, layout.experts, len(bits)))
    weights = np.zeros(layout.layers)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in layout.files]
        for piece in layout.slices:
            offered = [width for width in bits if can_narrow(piece.type, width)]
            columns = [bits.index(width) for width in offered]
            size = piece.columns * piece.rows
            weights[piece.layer] += size
            for expert in range(layout.experts if offered else 0):
                files[piece.file].seek(piece.offset_of(expert))
                data = files[piece.file].read(piece.n_bytes)
                if len(data) < piece.n_bytes:
                    raise ExpertReadError(f"{layout.name} ends before {piece.name}")
                found = narrow_errors(piece.type, piece.columns, piece.rows, offered, np.frombuffer(data, np.uint8))
                errors[piece.layer, expert, columns] += size * np.array(found)
    return errors / weights[:, None, None]
