"""Speculation is exact: whatever a proposer guesses, the tokens are those that come without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgellm.backend.sampler import Grammar, SamplingParams
from edgellm.engine.sequence import Proposer
from tests.engine.rig import DRAWN, GREEDY, Sink, a_runner, answer, drain, live_cells, start

PROMPT = list(b"the quick brown fox")
COUNT = 24
SAMPLINGS = [
    pytest.param(GREEDY, id="greedy"),
    pytest.param(replace(DRAWN, seed=3), id="seeded"),
    pytest.param(replace(DRAWN, seed=4, presence_penalty=1.0), id="penalised"),
    pytest.param(replace(DRAWN, seed=5, grammar=Grammar("root ::= [a-z ]*")), id="grammar"),
]


class _Knows:
    """Proposes what it was told the whole will be, shifted by `error` in every `period`-th token."""

    def __init__(self, whole: Sequence[int], *, period: int = 0) -> None:
        self.whole = list(whole)
        self.period = period

    def propose(self, tokens: Sequence[int], limit: int) -> Sequence[int]:
        start = len(tokens)
        guesses = self.whole[start : start + limit]
        if not self.period:
            return guesses
        return [g if (start + i) % self.period else (g + 1) % 256 for i, g in enumerate(guesses)]


class _Guesses:
    """Proposes random bytes, a random number of them."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def propose(self, _tokens: Sequence[int], limit: int) -> Sequence[int]:
        return self._random.integers(0, 256, self._random.integers(0, limit + 1)).tolist()


PROPOSERS: dict[str, Callable[[list[int]], Proposer]] = {
    "always-right": _Knows,
    "always-wrong": lambda whole: _Knows(whole, period=1),
    "sometimes-wrong": lambda whole: _Knows(whole, period=3),
    "random": lambda _whole: _Guesses(),
}


def _plain(llama: Path, sampling: SamplingParams) -> Sink:
    with a_runner(llama) as runner:
        return answer(runner, PROMPT, COUNT, sampling=sampling, top_logprobs=0)


@pytest.mark.parametrize("kind", PROPOSERS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_tokens_do_not_depend_on_the_proposer(llama: Path, kind: str, sampling: SamplingParams) -> None:
    plain = _plain(llama, sampling)
    proposer = PROPOSERS[kind]([*PROMPT, *plain.tokens()])
    with a_runner(llama, draft_tokens=4, proposer=proposer) as runner:
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
    with a_runner(llama, draft_tokens=3, proposer=_Knows([*PROMPT, *plain.tokens(1)], period=4)) as runner:
        drafted = answer(runner, PROMPT, COUNT, n=3, sampling=sampling)
        assert [drafted.tokens(i) for i in range(3)] == [plain.tokens(i) for i in range(3)]
        assert live_cells(runner) == 0


def test_drafts_under_pressure_lose_nothing(llama: Path) -> None:
    prompts = [PROMPT, list(b"hello world"), list(b"name")]
    with a_runner(llama) as runner:
        plain = [answer(runner, prompt, 110).tokens() for prompt in prompts]
    with a_runner(llama, context_tokens=256, draft_tokens=4, proposer=_Guesses()) as runner:
        sinks = [start(runner, prompt, 110)[0] for prompt in prompts]
        drain(runner)
        assert runner.stats.preemptions > 0
        assert [sink.tokens() for sink in sinks] == plain


def test_a_stop_token_within_a_draft_ends_the_answer(llama: Path) -> None:
    plain = _plain(llama, GREEDY).tokens()
    stop = plain[6]
    with a_runner(llama, draft_tokens=8, proposer=_Knows([*PROMPT, *plain])) as runner:
        sink = answer(runner, PROMPT, COUNT, stop_tokens=frozenset({stop}))
        assert sink.tokens() == plain[: plain.index(stop)]
        again = answer(runner, [*PROMPT, *plain], 8)  # continues what the ended answer left in the cache
    with a_runner(llama) as runner:
        assert again.tokens() == answer(runner, [*PROMPT, *plain], 8).tokens()
