"""What else the target might have written: its likeliest tokens at each place of its answers, in drafter tokens.

A drafter token that begins where one of the target's does is learned as a distribution over the first drafter tokens of
the target's likeliest ones (knowledge distillation, arXiv 1503.02531, across vocabularies).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from edgellm.backend.model import Model
from edgellm.speculative.bridge import Bridge
from edgellm.speculative.buffer import Record
from edgellm.tune.draft.samples import Row, Sample, Soft
from edgellm.tune.teacher import Likeliest, Teacher, longest_of

_TOP = 12  # tokens of a place
_READ_TOKENS = 2048  # of a prompt and its answer
_TOLD = 50  # answers between reports


def as_record(row: Row) -> Record:
    """What the target reads of a row: the answer, and the end of a prompt that is too long."""
    room = max(1, _READ_TOKENS - len(row.answer))
    return Record(tuple(row.prompt[-room:]), tuple(row.answer))


def soften(bridge: Bridge, row: Row, sample: Sample, likeliest: Likeliest) -> Sample:
    """The sample with what was `likeliest` at places where tokens of both begin.

    It stays as it is if its text does not end with the answer: the answer was cut, or cannot be spelled.
    """
    drafter, target = bridge.drafter, bridge.target
    pieces = [target.pieces[token] for token in row.answer]
    text, answer = drafter.text(sample.tokens), b"".join(pieces)
    sizes = [len(drafter.pieces[token]) for token in sample.tokens]
    begins = {
        end - size: number for number, (end, size) in enumerate(zip(accumulate(sizes), sizes, strict=True)) if size
    }
    if not text.endswith(answer) or len(likeliest[0]) != len(row.answer):
        return sample
    soft = Soft([], [], [])
    at = len(text) - len(answer)
    for token, piece, others, parts in zip(row.answer, pieces, *(one.tolist() for one in likeliest), strict=True):
        place = begins.get(at, -1)
        at += len(piece)
        if place < sample.start:
            continue
        shares: dict[int, float] = {}
        for other, share in zip(others, parts, strict=True):
            first = sample.tokens[place] if other == token else _first(bridge, other)
            if first >= 0 and share > 0:
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
    target: Model,
    *,
    threads: int,
    report: Callable[[int, int], None],
    stopped: Callable[[], bool],
) -> list[Sample]:
    """As `soften`; what is left when `stopped` says so stays as it is.

    `report` is told how many of how many are done. Raises ModelLoadError, BackendError.
    """
    found, records = list(samples), [as_record(row) for row in rows]
    with Teacher(target, longest=longest_of(records), threads=threads, top=_TOP) as teacher:
        for number, (row, record) in enumerate(zip(rows, records, strict=True)):
            if stopped():
                break
            found[number] = soften(bridge, row, found[number], teacher.likeliest(record))
            if (number + 1) % _TOLD == 0 or number + 1 == len(found):
                report(number + 1, len(found))
    return found
