"""Sampling end to end with drafts, of good and of bad proposers, is distributed as the model says.

The reference is computed from the model's logits, one row at a time. The bounds are exceeded by a right implementation
once in a million times for each case; seeds are fixed, so a case that passes goes on passing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from math import log, sqrt
from pathlib import Path

import numpy as np
import pytest

from edgellm.backend.sampler import SamplingParams
from edgellm.speculative.acceptance import Acceptance
from edgellm.speculative.proposer import Guess, Prompt, Want
from edgellm.speculative.speculator import Speculator
from tests.engine.rig import a_runner, answer, plain_loop
from tests.engine.test_drafts import Free

PROMPT = list(b"the quick brown fox")
TOP = 3
LENGTH = 3
ANSWERS = 4096
_Z = 4.75  # of the standard normal distribution: one in a million lies above


@cache
def _probabilities(llama: Path) -> dict[tuple[int, ...], float]:
    """Of every answer of LENGTH tokens, each drawn from the TOP likeliest."""
    found = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for text, chance in found.items():
            _, rows = plain_loop(llama, [*PROMPT, *text], 1)
            logits = rows[0].astype(np.float64)
            likeliest = np.argsort(logits)[-TOP:]
            weights = np.exp(logits[likeliest] - logits[likeliest].max())
            for token, weight in zip(likeliest, weights / weights.sum(), strict=True):
                longer[(*text, int(token))] = chance * float(weight)
        found = longer
    return found


class _Picks:
    """Proposes an answer of its own choice."""

    name = "picks"

    def __init__(self, pick: Sequence[tuple[int, ...]]) -> None:
        self.acceptance = Acceptance((5.0,))
        self._pick = pick
        self._turn = 0

    def begin(self, _prompt: Prompt) -> None:
        return None

    def extend(self, _state: None, tokens: Sequence[int]) -> None:
        assert tokens

    def propose(self, wants: Sequence[Want]) -> list[Guess | None]:
        return [self._guess(want) for want in wants]

    def _guess(self, want: Want) -> Guess | None:
        self._turn += 1
        whole = self._pick[self._turn % len(self._pick)]
        tokens = whole[len(want.context) - len(PROMPT) :][: want.limit]
        return Guess(tokens, ((),) * len(tokens), (0.99,) * len(tokens)) if tokens else None

    def judge(self, _state: None, _guess: Guess, _fits: Sequence[bool]) -> None:
        pass

    def end(self, _state: None, _answer: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        pass

    def forget(self) -> None:
        pass


def _picks(kind: str, answers: dict[tuple[int, ...], float]) -> list[tuple[int, ...]]:
    ranked = sorted(answers, key=answers.__getitem__, reverse=True)
    if kind == "the likeliest":
        return ranked[:1]
    if kind == "the unlikeliest":
        return ranked[-1:]
    if kind == "never possible":
        return [(0, 1, 2)]
    if kind == "all in turn":
        return ranked
    first = ranked[0][0]  # two answers that begin alike
    return [text for text in ranked if text[0] == first][:2]


@pytest.mark.parametrize(
    "kind", ["none", "the likeliest", "the unlikeliest", "never possible", "all in turn", "shared prefixes"]
)
def test_the_distribution_is_the_models_own(llama: Path, kind: str) -> None:
    chances = _probabilities(llama)
    speculator = Speculator([_Picks(_picks(kind, chances))], Free()) if kind != "none" else None
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = rejected = 0
    with a_runner(llama, draft_rows=24, parallel=8, speculator=speculator) as runner:
        for batch in range(ANSWERS // 64):
            sampling = SamplingParams(temperature=1.0, top_k=TOP, seed=64 * batch)
            sink = answer(runner, PROMPT, LENGTH, n=64, sampling=sampling)
            counts.update(tuple(sink.tokens(index)) for index in range(64))
            accepted += sum(sink.finish(index).usage.accepted_draft_tokens for index in range(64))
            rejected += sum(sink.finish(index).usage.rejected_draft_tokens for index in range(64))
    assert set(counts) <= set(chances)
    expected = np.array([ANSWERS * chance for chance in chances.values()])
    found = np.array([counts[text] for text in chances])
    often = expected >= 5
    squares = float((((found - expected) ** 2) / expected)[often].sum())
    freedom = int(often.sum())
    # Wilson and Hilferty's approximation of the chi-square quantile.
    assert squares <= freedom * (1 - 2 / (9 * freedom) + _Z * sqrt(2 / (9 * freedom))) ** 3
    # The mean of the distance is at most this root; McDiarmid's inequality bounds how far it strays from it.
    distance = float(np.abs(found - expected).sum()) / (2 * ANSWERS)
    assert distance <= sqrt(len(chances) / ANSWERS) / 2 + sqrt(log(1e6) / (2 * ANSWERS))
    if kind in ("the likeliest", "all in turn", "shared prefixes"):
        assert accepted > 0.05 * ANSWERS
    if kind in ("the unlikeliest", "never possible"):
        assert rejected > 0.5 * ANSWERS
