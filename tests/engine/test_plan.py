"""What goes into a step, without a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.backend.context import Context
from edgellm.engine.cache import AdapterSet, Entry
from edgellm.engine.plan import Share, choose_adapters, plan_step
from edgellm.engine.sequence import Answer, Job
from edgellm.engine.types import AdapterUse, GenerateRequest

ONE: AdapterSet = (AdapterUse("one"),)
TWO: AdapterSet = (AdapterUse("two"),)


class _NoSampler:
    def sample(self, context: Context, row: int) -> int | None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def _answer(pending: int, adapters: AdapterSet = (), done: int = 0) -> Answer:
    tokens = [1] * (done + pending)
    job = Job(GenerateRequest(tuple(tokens), 10, adapters=adapters), lambda _events: None, 0)
    return Answer(job, 0, _NoSampler(), tokens, entry=Entry(0, adapters, tokens[:done], list(range(done))))


def _plan(running: list[Answer], adapters: AdapterSet = (), **more: object) -> list[Share]:
    limits = {"batch_tokens": 100, "prompt_chunk_tokens": 20} | more
    return plan_step(running, adapters, **limits)  # type: ignore[arg-type]


def test_decoding_answers_come_first_and_prompts_get_a_chunk() -> None:
    prompt, late, stream = _answer(50), _answer(5), _answer(1, done=9)
    shares = _plan([prompt, late, stream])
    assert [(share.answer, share.count, share.completes) for share in shares] == [
        (stream, 1, True),
        (prompt, 20, False),
    ]


def test_the_chunk_is_shared_by_prompts_in_order_of_arrival() -> None:
    shares = _plan([_answer(1, done=1), _answer(15), _answer(15), _answer(15)])
    assert [(share.count, share.completes) for share in shares] == [(1, True), (15, True), (5, False)]


def test_without_a_stream_prompts_take_the_whole_batch() -> None:
    assert [(share.count, share.completes) for share in _plan([_answer(70), _answer(70)])] == [(70, True), (30, False)]


def test_a_stream_of_another_adapter_set_counts() -> None:
    shares = _plan([_answer(1, ONE, done=4), _answer(70)])
    assert [share.count for share in shares] == [20]


@given(
    st.lists(st.tuples(st.just(1) | st.integers(1, 80), st.sampled_from([(), ONE])), min_size=1, max_size=16),
    st.integers(16, 64),
    st.integers(1, 64),
)
def test_a_step_keeps_its_bounds(wanted: list[tuple[int, AdapterSet]], batch_tokens: int, chunk: int) -> None:
    running = [_answer(pending, adapters) for pending, adapters in wanted]
    for adapters in {answer.job.request.adapters for answer in running}:
        shares = _plan(running, adapters, batch_tokens=batch_tokens, prompt_chunk_tokens=chunk)
        assert shares
        assert sum(share.rows for share in shares) <= batch_tokens
        assert all(share.answer.job.request.adapters == adapters for share in shares)
        assert all(share.completes == (share.count == share.answer.pending) for share in shares)
        streams = {id(a) for a in running if a.pending == 1 and a.job.request.adapters == adapters}
        assert streams <= {id(share.answer) for share in shares}
        if any(answer.pending == 1 for answer in running):
            assert sum(share.count for share in shares if share.answer.pending > 1) <= chunk


@pytest.mark.parametrize(("last", "expected"), [((), ONE), (ONE, TWO), (TWO, ()), (None, ()), (ONE[:0], ONE)])
def test_adapter_sets_take_turns(last: AdapterSet | None, expected: AdapterSet) -> None:
    running = [_answer(1), _answer(1, ONE), _answer(9), _answer(1, TWO)]
    assert choose_adapters(running, last) == expected


def test_a_set_that_is_gone_leaves_the_turn_to_the_first() -> None:
    assert choose_adapters([_answer(1, TWO), _answer(1)], ONE) == TWO
