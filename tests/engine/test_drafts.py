"""Speculation is exact: whatever a proposer guesses, the tokens are those that come without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgellm.backend.sampler import Grammar, SamplingParams
from edgellm.engine.runner import Runner
from edgellm.speculative.acceptance import Acceptance
from edgellm.speculative.costs import WIDTHS, StepCosts
from edgellm.speculative.proposer import Guess, Prompt, Want
from edgellm.speculative.speculator import Speculator
from tests.engine.rig import DRAWN, GREEDY, Sink, a_runner, answer, drain, live_cells, start

PROMPT = list(b"the quick brown fox")
COUNT = 24
SAMPLINGS = [
    pytest.param(GREEDY, id="greedy"),
    pytest.param(replace(DRAWN, seed=3), id="seeded"),
    pytest.param(replace(DRAWN, seed=4, presence_penalty=1.0), id="penalised"),
    pytest.param(replace(DRAWN, seed=5, grammar=Grammar("root ::= [a-z ]*")), id="grammar"),
]


class Free(StepCosts):
    """However many rows a step has, it takes a second: so everything is drafted that may be accepted at all."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(WIDTHS, 1.0))

    def observe(self, _rows: int, _seconds: float) -> None:
        pass


class _Knows:
    """Proposes what it was told the whole will be, shifted by `error` in every `period`-th token."""

    name = "told"

    def __init__(self, whole: Sequence[int], *, period: int = 0, most: int = 4) -> None:
        self.acceptance = Acceptance((5.0,))
        self.whole = list(whole)
        self.period = period
        self.most = most
        self.ended: list[list[int]] = []
        self.told: list[int] = []

    def begin(self, _prompt: Prompt) -> None:
        return None

    def extend(self, _state: None, tokens: Sequence[int]) -> None:
        self.told += tokens

    def propose(self, wants: Sequence[Want]) -> list[Guess | None]:
        return [self._guess(want.context, min(self.most, want.limit)) for want in wants]

    def _guess(self, context: Sequence[int], limit: int) -> Guess | None:
        start = len(context)
        guesses = self.tokens(start, limit)
        return Guess(tuple(guesses), ((),) * len(guesses), (0.99,) * len(guesses)) if guesses else None

    def tokens(self, start: int, limit: int) -> list[int]:
        guesses = self.whole[start : start + limit]
        if not self.period:
            return guesses
        return [g if (start + i) % self.period else (g + 1) % 256 for i, g in enumerate(guesses)]

    def judge(self, _state: None, guess: Guess, fits: Sequence[bool]) -> None:
        assert 1 <= len(fits) <= len(guess.tokens)
        assert all(fits[:-1])

    def end(self, _state: None, answer: Sequence[int]) -> None:
        self.ended.append(list(answer))

    def close(self) -> None:
        pass

    def forget(self) -> None:
        pass


class _Guesses(_Knows):
    """Proposes random bytes, a random number of them."""

    def __init__(self) -> None:
        super().__init__(())
        self._random = np.random.default_rng(0)

    def tokens(self, _start: int, limit: int) -> list[int]:
        found: list[int] = self._random.integers(0, 256, self._random.integers(0, limit + 1)).tolist()
        return found


PROPOSERS: dict[str, Callable[[list[int]], _Knows]] = {
    "always-right": _Knows,
    "always-wrong": lambda whole: _Knows(whole, period=1),
    "sometimes-wrong": lambda whole: _Knows(whole, period=3),
    "random": lambda _whole: _Guesses(),
}


def _drafting(path: Path, proposer: _Knows, **options: int) -> AbstractContextManager[Runner]:
    return a_runner(path, draft_rows=32, speculator=Speculator([proposer], Free()), **options)


def _plain(llama: Path, sampling: SamplingParams) -> Sink:
    with a_runner(llama) as runner:
        return answer(runner, PROMPT, COUNT, sampling=sampling, top_logprobs=0)


@pytest.mark.parametrize("kind", PROPOSERS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_tokens_do_not_depend_on_the_proposer(llama: Path, kind: str, sampling: SamplingParams) -> None:
    plain = _plain(llama, sampling)
    proposer = PROPOSERS[kind]([*PROMPT, *plain.tokens()])
    with _drafting(llama, proposer) as runner:
        drafted = answer(runner, PROMPT, COUNT, sampling=sampling, top_logprobs=0)
        steps = runner.stats.steps
        assert live_cells(runner) == 0
    assert drafted.tokens() == plain.tokens()
    assert drafted.finish().reason is plain.finish().reason
    found = [logprob.logprob for logprob in drafted.logprobs()]
    assert found == pytest.approx([logprob.logprob for logprob in plain.logprobs()], abs=5e-3)
    usage = drafted.finish().usage
    if kind == "always-right":
        assert usage.rejected_draft_tokens == 0
        assert usage.accepted_draft_tokens >= COUNT - steps
        assert steps <= 1 + -(-COUNT // 5) + 1
    if kind == "always-wrong":
        assert usage.accepted_draft_tokens == 0
        assert usage.rejected_draft_tokens > 0
        assert steps == COUNT


def test_n_drafting_answers_beside_each_other(llama: Path) -> None:
    sampling = replace(DRAWN, seed=9)
    with a_runner(llama) as runner:
        plain = answer(runner, PROMPT, COUNT, n=3, sampling=sampling)
    with _drafting(llama, _Knows([*PROMPT, *plain.tokens(1)], period=4, most=3)) as runner:
        drafted = answer(runner, PROMPT, COUNT, n=3, sampling=sampling)
        assert [drafted.tokens(i) for i in range(3)] == [plain.tokens(i) for i in range(3)]
        assert live_cells(runner) == 0


def test_drafts_under_pressure_lose_nothing(llama: Path) -> None:
    prompts = [PROMPT, list(b"hello world"), list(b"name")]
    with a_runner(llama) as runner:
        plain = [answer(runner, prompt, 110).tokens() for prompt in prompts]
    with _drafting(llama, _Guesses(), context_tokens=256) as runner:
        sinks = [start(runner, prompt, 110)[0] for prompt in prompts]
        drain(runner)
        assert runner.stats.preemptions > 0
        assert [sink.tokens() for sink in sinks] == plain


def test_a_stop_token_within_a_draft_ends_the_answer(llama: Path) -> None:
    plain = _plain(llama, GREEDY).tokens()
    stop = plain[6]
    with _drafting(llama, _Knows([*PROMPT, *plain], most=8)) as runner:
        sink = answer(runner, PROMPT, COUNT, stop_tokens=frozenset({stop}))
        assert sink.tokens() == plain[: plain.index(stop)]
        again = answer(runner, [*PROMPT, *plain], 8)  # continues what the ended answer left in the cache
    with a_runner(llama) as runner:
        assert again.tokens() == answer(runner, [*PROMPT, *plain], 8).tokens()
