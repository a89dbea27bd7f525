"""What training computes natively between products of matrices (kernels/training.h), shared out to threads.

Numbers are float32, or bfloat16 as the uint16 that hold its bits. Arrays lie in one piece; results are written into
arrays that the caller gives. All functions raise TypeError for arrays of other types, ValueError where sizes differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm import _kernels
from edgellm.backend.threads import in_shares

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float32] | npt.NDArray[np.uint16]

_ROWS = 64  # fewer rows are not worth a thread
_ELEMENTS = 1 << 16  # nor are fewer elements


@dataclass(frozen=True, slots=True)
class Heads:
    """How attention's heads stand: (tokens, heads, width), or grouped as (heads / share, tokens, share, width)."""

    heads: int
    share: int  # heads of a group, which have keys in common
    interleaved: bool = False  # a rotation's pairs are neighbours; else they are half the turned width apart


@dataclass(frozen=True, slots=True)
class Sight:
    """What rows of scores see, (groups, rows, keys): row r belongs to query r // share, which sees the keys up to
    number past + r // share, and of these the last `window`; 0: all."""

    share: int
    past: int
    window: int
    scale: float  # of the scores


def available() -> list[str]:
    """Names of the kernels that this processor runs, the fastest first."""
    return _kernels.training_kernels()


@functools.cache
def _fastest() -> str:
    return available()[0]


class TrainingKernels:
    """The functions, on some threads."""

    def __init__(self, threads: int, kernels: str | None = None) -> None:
        """`kernels`: one of `available()`; None: the fastest."""
        self._threads = threads
        self._name = kernels or _fastest()

    def norm(self, x: Floats, weight: Floats, epsilon: float, y: Numbers, scale: Floats) -> None:
        """y = x * scale * weight; scale, (rows,) = 1 / rms(x). x, y: (rows, columns)."""
        self._rows(len(x), lambda at: _kernels.training_norm(self._name, x[at], weight, epsilon, y[at], scale[at]))

    def norm_back(self, dy: Numbers, x: Floats, weight: Floats, scale: Floats, dx: Floats) -> None:
        """The gradient of x from that of y."""
        self._rows(len(x), lambda at: _kernels.training_norm_back(self._name, dy[at], x[at], weight, scale[at], dx[at]))

    def gate(self, gate: Numbers, up: Numbers, gelu: bool, y: Numbers) -> None:
        """y = silu(gate) * up, or with tanh-GELU; all flat."""
        self._share(gate.size, _ELEMENTS, lambda at: _kernels.training_gate(self._name, gate[at], up[at], gelu, y[at]))

    def gate_back(self, dy: Numbers, gate: Numbers, up: Numbers, gelu: bool, dgate: Numbers, dup: Numbers) -> None:
        """The gradients of gate and up from that of y; all flat."""
        self._share(
            gate.size,
            _ELEMENTS,
            lambda at: _kernels.training_gate_back(self._name, dy[at], gate[at], up[at], gelu, dgate[at], dup[at]),
        )

    def turn(self, how: Heads, x: Numbers, cosine: Floats, sine: Floats, y: Numbers, *, back: bool = False) -> None:
        """x's heads turned by rotary embeddings and grouped; cosine, sine: (tokens, pairs). `back`: from grouped
        heads, turned the other way."""
        arguments = (cosine, sine, how.heads, how.share, how.interleaved, back)
        self._rows(
            len(cosine),
            lambda at: _kernels.training_turn(self._name, x, *arguments, at.start, at.stop, y),
        )

    def softmax(self, sight: Sight, scores: Numbers) -> None:
        """scores, (groups, rows, keys), to weights, in place."""
        of = (sight.share, sight.past, sight.window, sight.scale)
        self._rows(
            scores.shape[0] * scores.shape[1],
            lambda at: _kernels.training_softmax(self._name, *of, at.start, at.stop, scores),
        )

    def softmax_back(self, sight: Sight, weights: Numbers, gradient: Numbers) -> None:
        """The weights' gradient to the scores', in place."""
        of = (sight.share, sight.past, sight.window, sight.scale)
        self._rows(
            weights.shape[0] * weights.shape[1],
            lambda at: _kernels.training_softmax_back(self._name, *of, at.start, at.stop, weights, gradient),
        )

    def losses(
        self,
        logits: Numbers,
        targets: npt.NDArray[np.int64],
        losses: Floats,
        correct: npt.NDArray[np.bool_],
        *,
        gradient: bool,
    ) -> None:
        """-log softmax(logits)[target] of each row, and whether the target is the likeliest; with `gradient`, logits
        become softmax - one-hot, else they stay. logits: (rows, vocabulary)."""
        self._share(
            len(logits),
            8,
            lambda at: _kernels.training_losses(self._name, logits[at], targets[at], gradient, losses[at], correct[at]),
        )

    def _rows(self, count: int, work: Callable[[slice], None]) -> None:
        self._share(count, _ROWS, work)

    def _share(self, count: int, least: int, work: Callable[[slice], None]) -> None:
        in_shares(work, count, self._threads, least)
