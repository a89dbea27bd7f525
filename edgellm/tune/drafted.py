"""Answers of a target as a drafter is to learn them: in its own tokens, with what is wanted at each.

The hybrid distillation of OmniDraft (arXiv 2507.02659, section 3.2): where a drafter token stands for exactly one
token of the target, the target's probabilities; where several drafter tokens spell one, those tokens, at a fifth of the
weight; nothing where the two tokenisations do not meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgellm.speculative.bridge import Bridge
from edgellm.speculative.buffer import Record
from edgellm.speculative.transcript import Transcript
from edgellm.tune.prefix_tree import Packed, pack
from edgellm.tune.soft_loss import SoftTargets
from edgellm.tune.teacher import Likeliest

NGRAM_WEIGHT = 0.2
"""Of the parts of a target token; lambda in the paper."""

_SLACK = 1e-3  # of a target's probabilities, that float16 or a sum may be off by


@dataclass(frozen=True, slots=True)
class Run:
    """Drafter tokens [start, end) of a transcript that stand for one target token of the answer."""

    start: int
    end: int
    token: int  # of the target
    place: int  # in the answer


@dataclass(frozen=True, slots=True, eq=False)
class DraftedAnswer:
    """One record in drafter tokens."""

    tokens: NDArray[np.int32]  # (tokens,)
    places: NDArray[np.int64]  # (places,), from 1: tokens that are learnt from those before them
    weights: NDArray[np.float32]  # (places,)
    rows: NDArray[np.int64]  # (entries,): which of the places
    wanted: NDArray[np.int64]  # (entries,): drafter tokens
    probabilities: NDArray[np.float32]  # (entries,)


def runs_of(bridge: Bridge, record: Record, tokens: Sequence[int], held: bytes) -> list[Run]:
    """Where the two tokenisations meet on both sides of one target token of the answer.

    `tokens` and `held` are the transcript's. None where the drafter's vocabulary cannot spell the text.
    """
    drafter = bridge.drafter
    begins = 1 if drafter.vocab.adds_bos else 0
    ends = _ends(len(drafter.pieces[token]) or 1 for token in tokens[begins:])
    sizes = list(_target_sizes(bridge, record))
    if (ends[-1] if ends else 0) + len(held) != sum(sizes):
        return []
    starts = {0: begins} | {end: begins + number + 1 for number, end in enumerate(ends)}
    runs, at, first = [], 0, len(sizes) - len(record.answer)
    for number, size in enumerate(sizes):
        start, end = starts.get(at), starts.get(at + size)
        at += size
        if number >= first and size and start is not None and end is not None:
            runs.append(Run(start, end, record.answer[number - first], number - first))
    return runs


def drafted(
    bridge: Bridge, record: Record, likeliest: Likeliest, to_drafter: Mapping[int, int], *, most_tokens: int
) -> DraftedAnswer | None:
    """What is to be learnt of a record, of its first `most_tokens` tokens; None if there is nothing.

    `to_drafter`: see `direct_tokens`.
    """
    transcript = Transcript(bridge, [*record.prompt, *record.answer])
    tokens = list(transcript.tokens)
    places: list[int] = []
    weights: list[float] = []
    entries: list[tuple[int, int, float]] = []
    for run in runs_of(bridge, record, tokens, transcript.held):
        if run.end > most_tokens:
            break
        if run.end - run.start == 1 and bridge.direct[tokens[run.start]] == run.token:
            found = _mapped(likeliest, run.place, to_drafter)
            learnt = [(run.start, 1.0, found)] if found else []
        elif run.end - run.start > 1:
            learnt = [(place, NGRAM_WEIGHT, {tokens[place]: 1.0}) for place in range(run.start, run.end)]
        else:
            learnt = []
        for place, weight, wanted in learnt:
            if place:
                entries += [(len(places), token, p) for token, p in wanted.items()]
                places.append(place)
                weights.append(weight)
    if not places:
        return None
    return DraftedAnswer(
        np.array(tokens[:most_tokens], np.int32),
        np.array(places, np.int64),
        np.array(weights, np.float32),
        np.array([row for row, _, _ in entries], np.int64),
        np.array([token for _, token, _ in entries], np.int64),
        np.array([p for _, _, p in entries], np.float32),
    )


def direct_tokens(bridge: Bridge) -> dict[int, int]:
    """For target tokens that one drafter token stands for: that token, the one its tokenizer uses."""
    found: dict[int, int] = {}
    for token, target in enumerate(bridge.direct):
        if target >= 0:
            piece = bridge.drafter.pieces[token]
            if target not in found or (piece and bridge.drafter.find(piece) == token):
                found[target] = token
    return found


def together(answers: Sequence[DraftedAnswer]) -> tuple[Packed, torch.Tensor, SoftTargets]:
    """Answers as one pack, in which rows of it something is learnt, (places,), and what."""
    packed = pack([answer.tokens for answer in answers])
    before = np.cumsum([0, *(len(answer.places) for answer in answers)])
    rows = [packed.rows(number)[torch.from_numpy(answer.places - 1)] for number, answer in enumerate(answers)]
    targets = SoftTargets(
        torch.from_numpy(np.concatenate([answer.tokens[answer.places] for answer in answers]).astype(np.int64)),
        torch.from_numpy(np.concatenate([answer.weights for answer in answers])),
        torch.from_numpy(np.concatenate([answer.rows + start for answer, start in zip(answers, before, strict=False)])),
        torch.from_numpy(np.concatenate([answer.wanted for answer in answers])),
        torch.from_numpy(np.concatenate([answer.probabilities for answer in answers])),
    )
    return packed, torch.cat(rows), targets


def _mapped(likeliest: Likeliest, place: int, to_drafter: Mapping[int, int]) -> dict[int, float]:
    """The target's probabilities at a place of the answer, of drafter tokens."""
    found: dict[int, float] = {}
    for token, probability in zip(likeliest[0][place].tolist(), likeliest[1][place].tolist(), strict=True):
        mine = to_drafter.get(token)
        if mine is not None and probability > 0:
            found[mine] = found.get(mine, 0.0) + probability
    whole = sum(found.values())
    return {token: p / whole for token, p in found.items()} if 1 < whole < 1 + _SLACK else found


def _target_sizes(bridge: Bridge, record: Record) -> Iterator[int]:
    """Bytes of the target's tokens as a transcript has them; 1 for a control token that the drafter has as well."""
    target = bridge.target
    tokens = [*record.prompt, *record.answer]
    for number, token in enumerate(tokens):
        if number == 0 and target.vocab.adds_bos and token == target.vocab.bos:
            yield 0
        elif target.pieces[token]:
            yield len(target.pieces[token])
        else:
            yield 1 if bridge.control_to_drafter(token) >= 0 else len(target.vocab.special_bytes(token))


def _ends(sizes: Iterator[int]) -> list[int]:
    ends, at = [], 0
    for size in sizes:
        at += size
        ends.append(at)
    return ends
