"""On fixed logits, a drafting runner draws the very tokens that plain sampling draws with the same random numbers.

The logits are a function of the tokens before: no kernel rounds differently for more rows, so equality is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.backend.batch import Batch
from edgellm.backend.model import Model
from edgellm.backend.sampler import Grammar, Sampler, SamplingParams
from edgellm.backend.vocab import Vocab
from edgellm.engine.cache import PrefixCache
from edgellm.engine.plan import RunnerLimits
from edgellm.engine.runner import Runner
from edgellm.engine.types import FinishReason, GenerateRequest
from edgellm.speculative.acceptance import Acceptance
from edgellm.speculative.proposer import Guess, Prompt, Want
from edgellm.speculative.speculator import Speculator
from tests.engine.rig import Sink, drain
from tests.engine.test_drafts import Free

LETTERS = Grammar("root ::= [a-h ]*")
_CELLS = 512


@pytest.fixture(scope="module")
def model(llama: Path) -> Iterator[Model]:
    loaded = Model(llama)
    yield loaded
    loaded.close()


class _Logits:
    """Stands for a context: what it computes depends on the tokens of the sequence so far, and on `seed`."""

    has_memory = True
    context_tokens = _CELLS

    def __init__(self, vocab: Vocab, seed: int, sharpness: float) -> None:
        self._n_tokens = vocab.n_tokens
        self._seed, self._sharpness = seed, sharpness
        self._texts: dict[int, list[int]] = {}
        self._rows: list[np.ndarray] = []

    def decode(self, batch: Batch) -> None:
        self._rows = []
        for token, position, sequence in zip(batch._token, batch._pos, batch._seq, strict=True):
            if len(self._rows) == batch.n_tokens:
                break
            text = self._texts.setdefault(int(sequence), [])
            if len(text) != position:
                raise AssertionError(f"position {position} of sequence {sequence} follows {len(text)} tokens")
            text.append(int(token))
            self._rows.append(self.of(text))

    def of(self, text: Sequence[int]) -> np.ndarray:
        random = np.random.default_rng([self._seed, *text])
        return np.ascontiguousarray(self._sharpness * random.standard_normal(self._n_tokens), np.float32)

    def logits(self, row: int) -> np.ndarray:
        return self._rows[row]

    def logits_address(self, row: int) -> int:
        return self._rows[row].ctypes.data

    def remove(self, sequence: int, start: int = 0, _end: int = -1) -> bool:
        del self._texts.setdefault(sequence, [])[start:]
        return True

    def copy(self, source: int, target: int, end: int) -> None:
        self._texts[target] = self._texts[source][:end]

    def close(self) -> None:
        pass


class _Random:
    """Proposes, token by token, what will be drawn or something else: right with probability `skill`."""

    name = "random"

    def __init__(self, answers: Sequence[Sequence[int]], skill: float, seed: int, n_tokens: int) -> None:
        self.acceptance = Acceptance((3.0,))
        self._answers, self._skill, self._n_tokens = answers, skill, n_tokens
        self._random = np.random.default_rng(seed)

    def begin(self, _prompt: Prompt) -> None:
        return None

    def extend(self, _state: None, tokens: Sequence[int]) -> None:
        assert tokens

    def propose(self, wants: Sequence[Want]) -> list[Guess | None]:
        return [self._guess(list(want.context), want.limit) for want in wants]

    def _guess(self, context: list[int], limit: int) -> Guess | None:
        whole = next((a for a in self._answers if list(a[: len(context)]) == context), ())
        count = int(self._random.integers(0, limit + 1))
        tokens = [
            int(whole[place])
            if place < len(whole) and self._random.random() < self._skill
            else int(self._random.integers(0, self._n_tokens))
            for place in range(len(context), len(context) + count)
        ]
        return Guess(tuple(tokens), ((),) * count, (0.95,) * count) if tokens else None

    def judge(self, _state: None, guess: Guess, fits: Sequence[bool]) -> None:
        assert 1 <= len(fits) <= len(guess.tokens)

    def end(self, _state: None, _answer: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        pass

    def forget(self) -> None:
        pass


def _plain(model: Model, logits: _Logits, request: GenerateRequest, index: int) -> list[int]:
    """The reference: a loop that draws one token after the other."""
    sampler = Sampler(model.vocab, request.sampling, index=index, prompt=request.penalised_tokens)
    text, drawn = list(request.prompt), []
    while len(drawn) < request.max_tokens:
        logits._rows = [logits.of(text)]
        token = sampler.sample(logits, 0)  # type: ignore[arg-type]
        if token is None or model.vocab.is_end(token) or token in request.stop_tokens:
            break
        text.append(token)
        drawn.append(token)
    sampler.close()
    return drawn


_SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    typical_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.sampled_from([(), ((97, 4.0), (98, -100.0))]),
    seed=st.integers(0, 1000),
    grammar=st.sampled_from([None, None, LETTERS]),
)


@given(
    _SAMPLING,
    st.integers(0, 10_000),
    st.sampled_from([0.5, 2.0, 6.0]),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.integers(1, 3),
    st.frozensets(st.integers(97, 104), max_size=1),
)
@settings(max_examples=150, deadline=None)
def test_the_tokens_are_those_of_plain_sampling(
    model: Model,
    sampling: SamplingParams,
    seed: int,
    sharpness: float,
    skill: float,
    n: int,
    stop_tokens: frozenset[int],
) -> None:
    prompt = tuple(b"once")
    request = GenerateRequest(prompt, 20, sampling=sampling, n=n, stop_tokens=stop_tokens)
    logits = _Logits(model.vocab, seed, sharpness)
    expected = [_plain(model, logits, request, index) for index in range(n)]
    proposer = _Random([[*prompt, *answer] for answer in expected], skill, seed, model.vocab.n_tokens)
    context = _Logits(model.vocab, seed, sharpness)
    cache = PrefixCache(context, _CELLS, sequences=8, idle_cells=64)  # type: ignore[arg-type]
    limits = RunnerLimits(parallel=4, batch_tokens=64, prompt_chunk_tokens=16, draft_rows=24)
    runner = Runner(model, context, limits, cache, speculator=Speculator([proposer], Free()))  # type: ignore[arg-type]
    sink = Sink()
    runner.submit(request, sink)
    drain(runner)
    for index, tokens in enumerate(expected):
        assert sink.tokens(index) == tokens
        finish = sink.finish(index)
        assert finish.reason is (FinishReason.LENGTH if len(tokens) == 20 else FinishReason.STOP)
        assert finish.usage.accepted_draft_tokens <= len(tokens)
    if n == 1:
        usage = sink.finish().usage
        assert usage.accepted_draft_tokens + runner.stats.steps >= usage.completion_tokens
        assert skill < 1.0 or not usage.rejected_draft_tokens or len(expected[0]) < 20  # what it knew was accepted
