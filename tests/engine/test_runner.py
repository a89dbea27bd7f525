"""The runner on a real tiny model, compared with a plain loop: one sequence, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgellm.backend.batch import Batch
from edgellm.backend.sampler import Grammar, SamplingParams
from edgellm.engine.runner import Runner
from edgellm.engine.types import ErrorEvent, FinishReason, TokenEvent
from edgellm.errors import BackendError, GrammarError
from tests.engine.rig import DRAWN, GREEDY, Sink, a_runner, answer, assert_greedy, drain, live_cells, plain_loop, start

PROMPT = list(b"the quick brown fox jumps over the lazy dog")  # bytes are token ids in the tiny vocabulary
PROMPTS = [
    list(text) for text in (b"hello world", b"a", b"name of the user, in a longer prompt than that", b"01234567")
]


@pytest.fixture
def runner(llama: Path) -> Iterator[Runner]:
    with a_runner(llama) as made:
        yield made


class TestAnswers:
    @pytest.mark.parametrize("prompt", [PROMPT, [65]], ids=["long", "one-token"])
    def test_greedy_equals_the_plain_loop(self, runner: Runner, llama: Path, prompt: list[int]) -> None:
        sink = answer(runner, prompt, 40)
        assert_greedy(llama, prompt, sink.tokens(), 40)
        assert sink.finish().reason is FinishReason.LENGTH
        assert sink.finish().usage.prompt_tokens == len(prompt)
        assert sink.finish().usage.completion_tokens == 40

    def test_seeded_sampling_equals_the_plain_loop(self, runner: Runner, llama: Path) -> None:
        sampling = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, typical_p=0.98, seed=7)
        assert answer(runner, PROMPT, 30, sampling=sampling, ignore_eos=False).tokens() == _until_end(
            runner, plain_loop(llama, PROMPT, 30, sampling)[0]
        )

    def test_concurrent_answers_equal_their_solo_runs(self, runner: Runner, llama: Path) -> None:
        sinks = [start(runner, prompt, 24 + number)[0] for number, prompt in enumerate(PROMPTS)]
        drain(runner)
        for number, (prompt, sink) in enumerate(zip(PROMPTS, sinks, strict=True)):
            assert_greedy(llama, prompt, sink.tokens(), 24 + number)
            assert sink.finish().reason is FinishReason.LENGTH

    def test_more_answers_than_places_wait_their_turn(self, llama: Path) -> None:
        with a_runner(llama, parallel=2) as runner:
            sinks = [start(runner, prompt, 6)[0] for prompt in PROMPTS]
            runner.step()
            assert (runner.running, runner.waiting) == (2, 2)
            drain(runner)
            assert [len(sink.tokens()) for sink in sinks] == [6] * 4

    def test_a_stop_token_ends_the_answer_and_is_not_reported(self, runner: Runner) -> None:
        whole = answer(runner, PROMPT, 20).tokens()
        stop = whole[8]
        sink = answer(runner, PROMPT, 20, stop_tokens=frozenset({stop}))
        assert sink.tokens() == whole[: whole.index(stop)]
        assert sink.finish().reason is FinishReason.STOP

    def test_the_end_token_stops_unless_it_is_ignored(self, runner: Runner) -> None:
        end = runner.model.vocab.eos
        likes_to_end = replace(GREEDY, logit_bias=((end, 1000.0),))
        sink = answer(runner, PROMPT, 5, sampling=likes_to_end, ignore_eos=False)
        assert (sink.tokens(), sink.finish().reason) == ([], FinishReason.STOP)
        sink = answer(runner, PROMPT, 5, sampling=likes_to_end, ignore_eos=True)
        assert len(sink.tokens()) == 5
        assert not runner.model.vocab.end_tokens & set(sink.tokens())

    def test_an_answer_that_fills_the_cache_ends(self, llama: Path) -> None:
        with a_runner(llama, context_tokens=256) as runner:
            sink = answer(runner, PROMPT, 10_000)
            assert sink.finish().reason is FinishReason.LENGTH
            assert len(PROMPT) + len(sink.tokens()) == runner.context.context_tokens

    def test_a_prompt_as_long_as_the_cache_still_ends(self, llama: Path) -> None:
        with a_runner(llama, context_tokens=256) as runner:
            sink = answer(runner, [65] * 256, 10)
            assert sink.finish().reason is FinishReason.LENGTH
            assert len(sink.tokens()) <= 1
            assert live_cells(runner) == 0

    def test_an_out_of_vocabulary_token_is_an_error_and_the_runner_lives_on(self, runner: Runner) -> None:
        assert isinstance(answer(runner, [1, 2, 10**6], 4).error, BackendError)
        assert len(answer(runner, PROMPT, 4).tokens()) == 4
        assert live_cells(runner) == 0


class TestPrefixReuse:
    def test_a_repeated_prompt_is_found_and_answered_alike(self, runner: Runner, llama: Path) -> None:
        first = answer(runner, PROMPT, 12)
        again = answer(runner, PROMPT, 12)
        assert first.finish().usage.cached_tokens == 0
        assert again.finish().usage.cached_tokens == len(PROMPT) - 1
        assert again.tokens() == first.tokens()

    def test_the_next_turn_of_a_chat_continues_where_it_ended(self, runner: Runner, llama: Path) -> None:
        first = answer(runner, PROMPT, 12).tokens()
        turn = [*PROMPT, *first, *b" and then"]
        computed = runner.stats.prompt_tokens
        second = answer(runner, turn, 12)
        assert second.finish().usage.cached_tokens == len(PROMPT) + 11  # the last drawn token was never computed
        assert runner.stats.prompt_tokens - computed == len(turn) - len(PROMPT) - 11
        assert_greedy(llama, turn, second.tokens(), 12)

    def test_a_prefix_of_a_running_answer_is_shared(self, runner: Runner, llama: Path) -> None:
        long, _ = start(runner, PROMPT, 30)
        for _ in range(4):
            runner.step()
        branch = [*PROMPT[:20], *b"something else"]
        other, _ = start(runner, branch, 10)
        drain(runner)
        assert other.finish().usage.cached_tokens == 20
        assert_greedy(llama, branch, other.tokens(), 10)
        assert_greedy(llama, PROMPT, long.tokens(), 30)

    @pytest.mark.parametrize("fill", [90, 128])
    def test_what_was_moved_out_of_the_cells_comes_back(self, llama: Path, fill: int) -> None:
        prompts = [[start + i % 7 for i in range(fill)] for start in (60, 80, 100, 120)]
        with a_runner(llama, context_tokens=512, idle_cells=64, saved_bytes=1 << 26) as runner:
            sinks = [answer(runner, prompt, 8) for prompt in prompts]
            assert runner.cache.saved_bytes > 0
            for prompt, sink in zip(prompts[:3], sinks, strict=False):
                turn = [*prompt, *sink.tokens(), *b"more"]
                follow = answer(runner, turn, 8)
                assert follow.finish().usage.cached_tokens == fill + 7
                assert_greedy(llama, turn, follow.tokens(), 8)
            branch = [*prompts[3][:80], 5, 6]
            assert_greedy(llama, branch, answer(runner, branch, 8).tokens(), 8)
            assert live_cells(runner) == 0


class TestManyAnswers:
    def test_n_answers_share_one_prompt(self, runner: Runner) -> None:
        sampling = replace(DRAWN, seed=40)
        sink = answer(runner, PROMPT, 15, n=3, sampling=sampling)
        assert runner.stats.prompt_tokens == len(PROMPT)
        assert [sink.finish(i).usage.cached_tokens for i in range(3)] == [0, len(PROMPT), len(PROMPT)]
        for index in range(3):
            alone = answer(runner, PROMPT, 15, sampling=replace(sampling, seed=40 + index))
            assert sink.tokens(index) == alone.tokens()
        assert live_cells(runner) == 0

    def test_more_answers_than_places(self, llama: Path) -> None:
        with a_runner(llama, parallel=2) as runner:
            sink = answer(runner, PROMPT, 7, n=5, sampling=SamplingParams(seed=3))
            assert [len(sink.tokens(i)) for i in range(5)] == [7] * 5
            assert [sink.finish(i).reason for i in range(5)] == [FinishReason.LENGTH] * 5

    def test_a_leader_of_one_token_leaves_its_prompt_to_the_others(self, runner: Runner) -> None:
        sink = answer(runner, PROMPT, 1, n=3)
        assert [sink.tokens(i) for i in range(3)] == [sink.tokens(0)] * 3
        assert runner.stats.prompt_tokens == len(PROMPT)

    def test_cancelling_the_leader_leaves_the_others(self, runner: Runner, llama: Path) -> None:
        sink, job = start(runner, [66] * 300, 5, n=2)
        runner.step()  # 256 rows: the leader is still reading
        runner.cancel(job, 0)
        drain(runner)
        assert sink.tokens(0) == []
        assert_greedy(llama, [66] * 300, sink.tokens(1), 5)


class TestPressure:
    def test_preemption_loses_nothing(self, llama: Path) -> None:
        with a_runner(llama, context_tokens=256) as runner:
            sinks = [start(runner, prompt, 120)[0] for prompt in PROMPTS]
            drain(runner)
            assert runner.stats.preemptions > 0
            assert live_cells(runner) == 0
        for prompt, sink in zip(PROMPTS, sinks, strict=True):
            assert_greedy(llama, prompt, sink.tokens(), 120)
            assert sink.finish().reason is FinishReason.LENGTH
            assert sink.finish().usage.completion_tokens == 120

    def test_preemption_of_followers_loses_nothing(self, llama: Path) -> None:
        with a_runner(llama, context_tokens=256) as runner:
            sink = answer(runner, PROMPT, 100, n=4, sampling=replace(DRAWN, seed=1))
            assert runner.stats.preemptions > 0
        with a_runner(llama) as roomy:
            whole = answer(roomy, PROMPT, 100, n=4, sampling=replace(DRAWN, seed=1))
            assert [sink.tokens(i) for i in range(4)] == [whole.tokens(i) for i in range(4)]

    def test_cancel_frees_the_cells(self, runner: Runner) -> None:
        sink, job = start(runner, PROMPT, 50)
        runner.step()
        heard = len(sink.events)
        runner.cancel(job)
        assert not runner.has_work
        assert live_cells(runner) == 0
        assert len(sink.events) == heard
        runner.cancel(job)  # once more does no harm

    def test_cancel_of_one_answer_leaves_the_others(self, runner: Runner) -> None:
        sink, job = start(runner, PROMPT, 20, n=3, sampling=SamplingParams(seed=5))
        runner.step()
        runner.step()
        runner.cancel(job, 1)
        drain(runner)
        assert [len(sink.tokens(i)) for i in range(3)] == [20, 2, 20]
        assert sink.finish(0).reason is sink.finish(2).reason is FinishReason.LENGTH
        assert live_cells(runner) == 0

    def test_cancel_while_waiting(self, llama: Path) -> None:
        with a_runner(llama, parallel=1) as runner:
            first, _ = start(runner, PROMPT, 5)
            second, job = start(runner, PROMPT, 5)
            runner.step()
            runner.cancel(job)
            drain(runner)
            assert (len(first.tokens()), second.events) == (5, [])

    def test_streams_move_while_a_long_prompt_is_read(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The gap bound: with a stream running, no step reads more than a chunk, and each gives the stream a token."""
        with a_runner(llama, context_tokens=4096, batch_tokens=512, prompt_chunk_tokens=128) as runner:
            rows: list[int] = []
            decode = runner.context.decode
            monkeypatch.setattr(runner.context, "decode", lambda b: (rows.append(b.n_tokens), decode(b))[1])
            stream, job = start(runner, PROMPT, 1000)
            runner.step()
            late, _ = start(runner, [65 + i % 26 for i in range(2000)], 1)
            rows.clear()
            steps = 0
            while not late.over:
                before = len(stream.tokens())
                runner.step()
                steps += 1
                assert len(stream.tokens()) == before + 1
            assert max(rows) <= 128 + 1
            assert sum(rows) == 2000 + steps
            assert steps == 16
            runner.cancel(job)

    def test_a_prompt_alone_takes_whole_batches(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with a_runner(llama, batch_tokens=256, prompt_chunk_tokens=16) as runner:
            rows: list[int] = []
            decode = runner.context.decode
            monkeypatch.setattr(runner.context, "decode", lambda b: (rows.append(b.n_tokens), decode(b))[1])
            answer(runner, [67] * 600, 1)
            assert rows == [256, 256, 88]


class TestLogprobs:
    def test_against_numpy(self, runner: Runner, llama: Path) -> None:
        sampling = SamplingParams(temperature=0.5, seed=2, presence_penalty=0.5, top_k=5)  # must not show in logprobs
        sink = answer(runner, PROMPT, 10, sampling=sampling, top_logprobs=4)
        tokens, rows = plain_loop(llama, PROMPT, 10, sampling)
        assert sink.tokens() == tokens
        for found, token, row in zip(sink.logprobs(), tokens, rows, strict=True):
            wide = row.astype(np.float64)
            expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
            assert found.token == token
            assert found.logprob == pytest.approx(expected[token], abs=2e-3)
            assert [t for t, _ in found.top] == list(np.argsort(-row, kind="stable")[:4])
            assert [p for _, p in found.top] == pytest.approx([expected[t] for t, _ in found.top], abs=2e-3)

    def test_zero_means_the_drawn_token_only(self, runner: Runner) -> None:
        assert all(found.top == () for found in answer(runner, PROMPT, 3, top_logprobs=0).logprobs())

    def test_none_means_none(self, runner: Runner) -> None:
        assert answer(runner, PROMPT, 3).logprobs() == []


class TestSampling:
    def test_the_seed_decides(self, runner: Runner) -> None:
        first = answer(runner, PROMPT, 20, sampling=SamplingParams(seed=1)).tokens()
        assert answer(runner, PROMPT, 20, sampling=SamplingParams(seed=1)).tokens() == first
        assert answer(runner, PROMPT, 20, sampling=SamplingParams(seed=2)).tokens() != first

    def test_logit_bias_forces_and_forbids(self, runner: Runner) -> None:
        forced = replace(GREEDY, logit_bias=((88, 1000.0),))
        assert answer(runner, PROMPT, 5, sampling=forced).tokens() == [88] * 5
        usual = answer(runner, PROMPT, 5).tokens()
        forbidden = replace(GREEDY, logit_bias=((usual[0], float("-inf")),))
        assert usual[0] not in answer(runner, PROMPT, 5, sampling=forbidden).tokens()

    @pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
    def test_answer_penalties_forbid_repetition_of_the_answer_only(self, runner: Runner, field: str) -> None:
        tokens = answer(runner, PROMPT, 40, sampling=replace(GREEDY, **{field: 1000.0})).tokens()
        assert len(set(tokens)) == 40
        first = answer(runner, PROMPT, 1).tokens()
        # the prompt does not count: what it holds may still come first
        assert (
            answer(runner, [*first, *PROMPT], 1, sampling=replace(GREEDY, **{field: 1000.0})).tokens()
            == answer(runner, [*first, *PROMPT], 1).tokens()
        )

    def test_repetition_penalty_sees_the_prompt(self, runner: Runner) -> None:
        favoured = answer(runner, PROMPT, 1).tokens()[0]
        bias = ((favoured, 50.0),)
        plain = replace(GREEDY, logit_bias=bias)
        prompt = [*PROMPT, favoured]
        assert answer(runner, prompt, 1, sampling=plain).tokens() == [favoured]
        penalised = replace(plain, repetition_penalty=1e6)
        assert answer(runner, prompt, 1, sampling=penalised).tokens() != [favoured]
        short = replace(penalised, repetition_window=3)
        assert answer(runner, [favoured, *PROMPT], 1, sampling=short).tokens() == [favoured]


class TestGrammar:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_every_answer_follows_the_grammar_and_stops_with_it(self, runner: Runner, temperature: float) -> None:
        grammar = Grammar('root ::= [a-c] [0-9] [0-9] "!"')
        for seed in range(5):
            sampling = SamplingParams(temperature=temperature, seed=seed, grammar=grammar)
            sink = answer(runner, PROMPT, 20, sampling=sampling, ignore_eos=False)
            text = _text(runner, sink.tokens())
            assert len(text) == 4
            assert text[0] in b"abc"
            assert text[1:3].isdigit()
            assert text[3:] == b"!"
            assert sink.finish().reason is FinishReason.STOP

    def test_a_grammar_that_allows_nothing_more_ends_the_answer(self, runner: Runner) -> None:
        sampling = replace(GREEDY, grammar=Grammar('root ::= "xy"'))  # ignore_eos forbids the end token as well
        sink = answer(runner, PROMPT, 20, sampling=sampling, ignore_eos=True)
        assert _text(runner, sink.tokens()) == b"xy"
        assert sink.finish().reason is FinishReason.STOP

    def test_a_grammar_that_takes_too_long_ends_its_own_request_only(
        self, runner: Runner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("edgellm.backend.sampler._GRAMMAR_LIMIT_S", -1.0)
        rare = Grammar('root ::= "\\x01" "\\x02"')  # nothing that the model would draw of itself
        bound, _ = start(runner, PROMPT, 5, sampling=replace(GREEDY, grammar=rare))
        free, _ = start(runner, PROMPT, 5)
        drain(runner)
        assert isinstance(bound.error, GrammarError)
        assert len(free.tokens()) == 5

    def test_nor_are_the_other_answers_of_that_request_drawn(
        self, runner: Runner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rare = Grammar('root ::= "\\x01" "\\x02" "\\x03"')
        sink, _ = start(runner, PROMPT, 5, n=2, sampling=replace(GREEDY, grammar=rare))
        while runner.running < 2:
            runner.step()
        monkeypatch.setattr("edgellm.backend.sampler._GRAMMAR_LIMIT_S", -1.0)
        drain(runner)
        assert isinstance(sink.error, GrammarError)
        assert runner.stats.failures == 0

    def test_a_bad_grammar_is_an_error_event(self, runner: Runner) -> None:
        sink, _ = start(runner, PROMPT, 5, n=2, sampling=replace(GREEDY, grammar=Grammar("root ::= nowhere")))
        assert isinstance(sink.error, GrammarError)
        assert len(sink.events) == 1
        assert not runner.has_work

    def test_constrained_and_free_answers_in_one_batch(self, runner: Runner, llama: Path) -> None:
        bound, _ = start(runner, PROMPT, 10, sampling=replace(GREEDY, grammar=Grammar("root ::= [0-9]+")))
        free, _ = start(runner, PROMPTS[0], 10)
        drain(runner)
        assert _text(runner, bound.tokens()).isdigit()
        assert_greedy(llama, PROMPTS[0], free.tokens(), 10)

    def test_a_lazy_grammar_binds_from_its_trigger_on(self, runner: Runner) -> None:
        force = tuple((token, 30.0) for token in b"<")  # the trigger is drawn first
        lazy = Grammar('root ::= "<" [0-9] [0-9] ">"', lazy_patterns=(r"[\s\S]*?(<)[\s\S]*",))
        sampling = replace(GREEDY, grammar=lazy, logit_bias=force)
        sink = answer(runner, PROMPT, 20, sampling=sampling, ignore_eos=False)
        text = _text(runner, sink.tokens())
        assert text[:1] == b"<"
        assert text[1:3].isdigit()
        assert text[3:] == b">"


class TestFailures:
    def test_a_failed_decode_ends_its_requests_and_frees_their_cells(
        self, runner: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sinks = [start(runner, prompt, 9)[0] for prompt in PROMPTS[:2]]

        def fail(_batch: Batch) -> None:
            raise BackendError("out of order")

        with monkeypatch.context() as patch:
            patch.setattr(runner.context, "decode", fail)
            runner.step()
        assert [str(sink.error) for sink in sinks] == ["out of order"] * 2
        assert not runner.has_work
        assert live_cells(runner) == 0
        assert runner.stats.failures == 1
        again = answer(runner, PROMPTS[0], 9)
        assert again.finish().usage.cached_tokens == 0
        assert_greedy(llama, PROMPTS[0], again.tokens(), 9)

    def test_an_answer_ends_once_though_its_step_fails_afterwards(
        self, runner: Runner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done, _ = start(runner, PROMPTS[0], 1)
        failed, _ = start(runner, PROMPTS[3], 5)
        logits, calls = runner.context.logits_address, []

        def second_fails(row: int) -> int:
            calls.append(row)
            if len(calls) > 1:
                raise BackendError("no such row")
            return logits(row)

        monkeypatch.setattr(runner.context, "logits_address", second_fails)
        runner.step()
        assert isinstance(failed.error, BackendError)
        assert done.finish().reason is FinishReason.LENGTH
        assert not any(isinstance(event, ErrorEvent) for event in done.events)

    def test_what_an_unexpected_failure_left_behind_is_not_reused(
        self, runner: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(runner, PROMPT, 5)

        def crash(_batch: Batch) -> None:
            raise RuntimeError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(runner.context, "decode", crash)
            with pytest.raises(RuntimeError, match="a bug"):
                runner.step()
        runner.fail_all(BackendError("internal error"))  # what the engine does
        again = answer(runner, PROMPT, 5)
        assert_greedy(llama, PROMPT, again.tokens(), 5)


def _text(runner: Runner, tokens: list[int]) -> bytes:
    return b"".join(runner.model.vocab.piece(token) for token in tokens)


def _until_end(runner: Runner, tokens: list[int]) -> list[int]:
    ends = [position for position, token in enumerate(tokens) if runner.model.vocab.is_end(token)]
    return tokens[: ends[0]] if ends else tokens


def test_every_step_delivers_at_most_once(runner: Runner) -> None:
    sink: Sink = answer(runner, PROMPT, 6, n=2)
    assert len(sink.batches) == 6
    assert [len([e for e in batch if isinstance(e, TokenEvent)]) for batch in sink.batches] == [2] * 6
