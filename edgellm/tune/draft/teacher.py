"""What else the target might have written: its likeliest tokens at each place of its answers, in drafter tokens.

A drafter token that begins where one of the target's does is learned as a distribution over the first drafter tokens of
the target's likeliest ones (knowledge distillation, arXiv 1503.02531, across vocabularies).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams, Floats
from edgellm.backend.model import Model
from edgellm.backend.packing import packing_kernels
from edgellm.speculative.bridge import Bridge
from edgellm.tune.draft.samples import Row, Sample, Soft

_TOP = 12  # tokens of a place
_READ_TOKENS = 2048  # of a prompt and its answer, from the end
_BATCH_TOKENS = 256
_TOLD = 50  # answers between reports
Top = list[tuple[int, float]]
"""Tokens of the target and their probabilities."""


class Teacher:
    """A target that reads its own answers. Close it: it holds the model."""

    def __init__(self, path: Path, *, threads: int) -> None:
        """Raises ModelLoadError, BackendError."""
        packed = packing_kernels() is not None
        self._model = Model(path, mapped=not packed, packed=packed)
        params = ContextParams(_READ_TOKENS, 1, _BATCH_TOKENS, _BATCH_TOKENS, threads)
        try:
            self._context = Context(self._model, params)
        except BaseException:
            self._model.close()
            raise
        self._batch = Batch(_BATCH_TOKENS)

    def close(self) -> None:
        """Frees the model."""
        self._context.close()
        self._model.close()

    def tops(self, row: Row) -> list[Top]:
        """For each token of the answer, what might have stood there. Raises BackendError."""
        tokens = [*row.prompt, *row.answer[:-1]][-_READ_TOKENS:]
        first = len(tokens) - len(row.answer)  # the first whose logits count
        found: list[Top] = []
        for start in range(0, len(tokens), _BATCH_TOKENS):
            part = tokens[start : start + _BATCH_TOKENS]
            wanted = min(len(part), max(1, start + len(part) - max(0, first)))
            self._batch.clear()
            self._batch.extend(part, start, 0, outputs=wanted)
            self._context.decode(self._batch)
            if start + len(part) > first:
                found += [_top(self._context.logits(number)) for number in range(len(part) - wanted, len(part))]
        self._context.remove(0)
        return found


def _top(logits: Floats) -> Top:
    best = np.argpartition(logits, -_TOP)[-_TOP:] if len(logits) > _TOP else np.arange(len(logits))
    highest = logits[best].max()
    whole = float(np.exp(logits - highest).sum())
    return [(int(token), float(np.exp(logits[token] - highest)) / whole) for token in best]


def soften(bridge: Bridge, row: Row, sample: Sample, tops: Sequence[Top]) -> Sample:
    """The sample with what `tops` say at places where tokens of both begin.

    It stays as it is if its text does not end with the answer: the answer was cut, or cannot be spelled.
    """
    drafter, target = bridge.drafter, bridge.target
    pieces = [target.pieces[token] for token in row.answer]
    text, answer = drafter.text(sample.tokens), b"".join(pieces)
    sizes = [len(drafter.pieces[token]) for token in sample.tokens]
    begins = {
        end - size: number for number, (end, size) in enumerate(zip(accumulate(sizes), sizes, strict=True)) if size
    }
    if not text.endswith(answer) or len(tops) != len(row.answer):
        return sample
    soft = Soft([], [], [])
    at = len(text) - len(answer)
    for token, piece, top in zip(row.answer, pieces, tops, strict=True):
        place = begins.get(at, -1)
        at += len(piece)
        if place < sample.start:
            continue
        shares: dict[int, float] = {}
        for other, share in top:
            first = sample.tokens[place] if other == token else _first(bridge, other)
            if first >= 0:
                shares[first] = shares.get(first, 0.0) + share
        if whole := sum(shares.values()):
            soft.places.append(place)
            soft.tokens.append(list(shares))
            soft.shares.append([share / whole for share in shares.values()])
    return Sample(sample.tokens, sample.start, soft)


def _first(bridge: Bridge, token: int) -> int:
    """The drafter token that a target's token begins with; -1 if there is none."""
    piece = bridge.target.pieces[token]
    spelled = bridge.drafter.spell(piece) if piece else None
    return spelled[0] if spelled else -1


def soften_all(
    bridge: Bridge,
    rows: Sequence[Row],
    samples: Sequence[Sample],
    teacher: Teacher,
    *,
    report: Callable[[int, int], None],
    stopped: Callable[[], bool],
) -> list[Sample]:
    """As `soften`; what is left when `stopped` says so stays as it is.

    `report` is told how many of how many are done.
    """
    found = list(samples)
    for number, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        if stopped():
            break
        found[number] = soften(bridge, row, sample, teacher.tops(row))
        if (number + 1) % _TOLD == 0 or number + 1 == len(found):
            report(number + 1, len(found))
    return found
