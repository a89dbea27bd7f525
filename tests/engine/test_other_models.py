"""Recurrent models, damaged models, and the hook into the compute graph."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgellm.backend.context import EvalCallback
from edgellm.engine.types import FinishReason
from edgellm.errors import BackendError, ModelUnsupportedError
from tests.engine.rig import a_runner, answer, assert_greedy, drain, live_cells, start
from tests.support.tiny_gguf import write_tiny_llama

PROMPT = list(b"the quick brown fox jumps")


class TestEncoders:
    @pytest.mark.parametrize("length", [10, 100])
    def test_text_is_refused(self, bert: Path, length: int) -> None:
        with a_runner(bert, context_tokens=128) as runner:
            sink, _ = start(runner, list(range(5, 15)) * (length // 10), 4)
            assert isinstance(sink.error, ModelUnsupportedError)
            assert not runner.has_work


class TestOddContexts:
    @pytest.mark.parametrize("context_tokens", [64, 100, 300])
    def test_a_prompt_may_fill_it_and_no_more_is_promised(self, llama: Path, context_tokens: int) -> None:
        with a_runner(llama, context_tokens=context_tokens) as runner:
            assert runner.context.context_tokens == context_tokens
            sinks = [start(runner, (PROMPT * 20)[: context_tokens - 2], 8)[0] for _ in range(2)]
            drain(runner)
            assert all(len(sink.tokens()) == 2 for sink in sinks)
            assert all(sink.finish().reason is FinishReason.LENGTH for sink in sinks)


class TestRecurrent:
    def test_answers_equal_the_plain_loop(self, mamba: Path) -> None:
        with a_runner(mamba) as runner:
            assert not runner.model.can_roll_back
            sinks = [start(runner, prompt, 16)[0] for prompt in (PROMPT, list(b"hello"))]
            drain(runner)
            assert_greedy(mamba, PROMPT, sinks[0].tokens(), 16)
            assert_greedy(mamba, list(b"hello"), sinks[1].tokens(), 16)

    def test_only_an_exact_continuation_is_reused(self, mamba: Path) -> None:
        with a_runner(mamba) as runner:
            first = answer(runner, PROMPT, 8).tokens()
            again = answer(runner, PROMPT, 8)  # would have to go back: computed anew
            assert again.finish().usage.cached_tokens == 0
            assert_greedy(mamba, PROMPT, again.tokens(), 8)
            turn = [*PROMPT, *first, *b" and"]
            follow = answer(runner, turn, 8)
            assert follow.finish().usage.cached_tokens == len(PROMPT) + 7
            assert_greedy(mamba, turn, follow.tokens(), 8)

    def test_several_answers_to_one_prompt(self, mamba: Path) -> None:
        with a_runner(mamba) as runner:
            sink = answer(runner, PROMPT, 8, n=2)
            for index in range(2):
                assert_greedy(mamba, PROMPT, sink.tokens(index), 8)

    def test_preemption_loses_nothing(self, mamba: Path) -> None:
        prompts = [PROMPT, list(b"hello"), list(b"world")]
        with a_runner(mamba, context_tokens=256) as runner:
            sinks = [start(runner, prompt, 100)[0] for prompt in prompts]
            drain(runner)
            assert runner.stats.preemptions > 0
            for prompt, sink in zip(prompts, sinks, strict=True):
                assert_greedy(mamba, prompt, sink.tokens(), 100)
            assert live_cells(runner) == 0


def test_a_mixture_of_experts(files: Path) -> None:
    path = write_tiny_llama(files / "moe.gguf", architecture="qwen3moe", experts=4)
    with a_runner(path) as runner:
        assert len(answer(runner, PROMPT, 12).tokens()) == 12


def test_a_model_that_computes_nan_is_an_error_and_the_runner_lives_on(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "nan.gguf")
    reader = gguf.GGUFReader(str(path), "r+")
    (norm,) = [tensor for tensor in reader.tensors if tensor.name == "output_norm.weight"]
    norm.data[:] = np.nan
    reader.data.flush()
    del norm, reader
    with a_runner(path) as runner:
        for _ in range(2):
            sink = answer(runner, PROMPT, 4)
            assert isinstance(sink.error, BackendError)
            assert "NaN" in str(sink.error)
            assert live_cells(runner) == 0


def test_the_eval_callback_sees_the_graph(llama: Path) -> None:
    asked: list[bool] = []

    @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    def callback(_tensor: int, ask: bool, user_data: int) -> bool:
        asked.append(user_data == 77)
        return not ask  # interested in no node

    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    with a_runner(llama, eval_callback=EvalCallback(address, 77)) as runner:
        sink = answer(runner, PROMPT, 3)
    assert sink.finish().reason is FinishReason.LENGTH
    assert asked
    assert all(asked)


@pytest.mark.parametrize("layers", [1, 3])
def test_quantised_weights(tmp_path: Path, layers: int) -> None:
    path = write_tiny_llama(tmp_path / "q8.gguf", weights="q8_0", layers=layers)
    with a_runner(path) as runner:
        first = answer(runner, PROMPT, 10).tokens()
        assert len(first) == 10
