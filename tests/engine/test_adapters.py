"""LoRA adapters in the runner: which batch they apply to, and what they must not leak into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgellm.backend.batch import Batch
from edgellm.backend.model import Adapter, Model
from edgellm.engine.runner import Runner
from edgellm.engine.types import AdapterUse
from edgellm.errors import AdapterError, AdapterNotFoundError
from tests.engine.rig import a_runner, answer, assert_greedy, drain, live_cells, start

PROMPT = list(b"the user is in the world of names")
ONE, TWO = (AdapterUse("one"),), (AdapterUse("two"),)


@pytest.fixture
def runner(llama: Path, loras: dict[str, Path]) -> Iterator[Runner]:
    with a_runner(llama, adapters=loras) as made:
        yield made


def test_an_adapter_changes_the_answer_and_only_its_own(runner: Runner, llama: Path, loras: dict[str, Path]) -> None:
    sets = [(), ONE, TWO, (AdapterUse("one", 0.5),), (AdapterUse("one"), AdapterUse("two", 0.3))]
    sinks = [start(runner, PROMPT, 12, adapters=use, top_logprobs=0)[0] for use in sets]
    drain(runner)
    assert len({round(sink.logprobs()[0].logprob, 2) for sink in sinks}) == len(sets)
    assert_greedy(llama, PROMPT, sinks[0].tokens(), 12)
    assert_greedy(llama, PROMPT, sinks[1].tokens(), 12, adapter=(loras["one"], 1.0))
    assert_greedy(llama, PROMPT, sinks[2].tokens(), 12, adapter=(loras["two"], 1.0))
    assert_greedy(llama, PROMPT, sinks[3].tokens(), 12, adapter=(loras["one"], 0.5))


def test_scale_zero_is_the_base(runner: Runner, llama: Path) -> None:
    assert_greedy(llama, PROMPT, answer(runner, PROMPT, 12, adapters=(AdapterUse("one", 0.0),)).tokens(), 12)


def test_a_batch_holds_one_adapter_set(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    active: list[tuple[str, ...]] = [()]
    seen: list[tuple[tuple[str, ...], set[int]]] = []
    set_adapters, decode = runner.context.set_adapters, runner.context.decode

    def spy_set(adapters: Any) -> None:
        active.append(tuple(adapter.path.stem for adapter, _ in adapters))
        set_adapters(adapters)

    def spy_decode(batch: Batch) -> None:
        seen.append((active[-1], set(batch._seq[: batch.n_tokens].tolist())))
        decode(batch)

    monkeypatch.setattr(runner.context, "set_adapters", spy_set)
    monkeypatch.setattr(runner.context, "decode", spy_decode)
    jobs = [start(runner, PROMPT, 6, adapters=use)[1] for use in ((), ONE, (), TWO)]
    runner.step()
    names = {a.entry.sequence: tuple(u.name for u in j.request.adapters) for j in jobs for a in j.answers if a.entry}
    drain(runner)
    assert len(names) == 4
    assert all(names[sequence] == adapters for adapters, batch in seen for sequence in batch)
    order = [adapters for adapters, _ in seen]
    assert order[:9] == [*[("one",), ("two",), ()] * 3]  # turns, starting after the set that was active: the base


def test_prefixes_are_not_reused_across_sets(runner: Runner) -> None:
    for use in ((), ONE, TWO, (AdapterUse("one", 0.5),)):
        assert answer(runner, PROMPT, 3, adapters=use).finish().usage.cached_tokens == 0
        assert answer(runner, PROMPT, 3, adapters=use).finish().usage.cached_tokens == len(PROMPT) - 1


def test_unloading_ends_the_requests_that_use_it(runner: Runner, llama: Path) -> None:
    running, _ = start(runner, PROMPT, 50, adapters=ONE)
    base, _ = start(runner, PROMPT, 20)
    for _ in range(4):
        runner.step()
    waiting, _ = start(runner, PROMPT, 50, adapters=(*TWO, *ONE))
    runner.remove_adapter("one")
    assert isinstance(running.error, AdapterNotFoundError)
    assert isinstance(waiting.error, AdapterNotFoundError)
    drain(runner)
    assert_greedy(llama, PROMPT, base.tokens(), 20)
    late, _ = start(runner, PROMPT, 5, adapters=ONE)
    assert isinstance(late.error, AdapterNotFoundError)
    assert live_cells(runner) == 0
    runner.remove_adapter("one")  # unknown names are ignored


def test_another_file_under_the_same_name(runner: Runner, llama: Path, loras: dict[str, Path]) -> None:
    answer(runner, PROMPT, 5, adapters=ONE)
    runner.add_adapter("one", Adapter(runner.model, loras["two"]))
    sink = answer(runner, PROMPT, 12, adapters=ONE)
    assert sink.finish().usage.cached_tokens == 0
    assert_greedy(llama, PROMPT, sink.tokens(), 12, adapter=(loras["two"], 1.0))


def test_an_adapter_of_another_model_is_refused(qwen: Path, loras: dict[str, Path]) -> None:
    model = Model(qwen)
    try:
        with pytest.raises(AdapterError, match="does not fit"):
            Adapter(model, loras["one"])
    finally:
        model.close()
