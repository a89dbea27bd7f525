"""A whole run in a process of its own: from a data file to an adapter that llama.cpp loads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edgellm.models.describe import describe
from edgellm.tune.own_process import CHILD
from tests.support.tiny_gguf import write_tiny_llama
from tests.tune.rig import divergence, true_logits

Events = list[dict[str, Any]]
SMALL: dict[str, object] = {"epochs": 3, "row_tokens": 128, "batch_size": 4, "sparsity": "top-1"}


def start(spec: dict[str, object]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "edgellm.tune", json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {CHILD: "1"},
    )


def run(**spec: object) -> tuple[int, Events]:
    """The process's status and its events."""
    process = start(spec)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        events = [json.loads(line) for line in process.stdout]
        errors = process.stderr.read()
    assert process.returncode in (0, 1), errors
    return process.returncode, events


def run_until(event: str, number: int, what: str | int, **spec: object) -> Events:
    """Runs until the `number`th event of a kind; then writes `what` to the process, or sends it that signal."""
    process = start(spec)
    assert process.stdin is not None
    assert process.stdout is not None
    events: Events = []
    with process:
        for line in process.stdout:
            events.append(json.loads(line))
            if events[-1]["event"] == event and len(named(events, event)) == number:
                if isinstance(what, int):
                    process.send_signal(what)
                else:
                    process.stdin.write(what)
                    process.stdin.flush()
    return events


def named(events: Events, name: str) -> Events:
    return [event for event in events if event["event"] == name]


def write_data(path: Path, count: int = 12, method: str = "supervised") -> Path:
    """The same answer to every question, or a preference for it."""
    examples: list[dict[str, Any]] = []
    for number in range(count):
        question = {"role": "user", "content": f"hello {number}"}
        good, bad = ({"role": "assistant", "content": text} for text in ("the world is true", "null"))
        if method == "supervised":
            examples.append({"messages": [question, good]})
        else:
            pair = {"preferred_output": [good], "non_preferred_output": [bad]}
            examples.append({"input": {"messages": [question]}, **pair})
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


@pytest.fixture
def facts(tmp_path: Path) -> dict[str, object]:
    model = write_tiny_llama(tmp_path / "model.gguf")
    data = write_data(tmp_path / "data.jsonl")
    return {"model": str(model), "data": str(data), "output": str(tmp_path / "adapter.gguf")}


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_from_a_file_to_an_adapter(facts: dict[str, object], tmp_path: Path, method: str) -> None:
    data = write_data(tmp_path / "data.jsonl", method=method)
    status, events = run(
        **facts, method=method, validation=str(data), epochs=6, row_tokens=128, batch_size=2, sparsity="top-1",
        learning_rate_multiplier=20,
    )  # fmt: skip
    assert status == 0
    done = events[-1]
    assert done["event"] == "done"
    assert done["adapter"] == facts["output"]
    assert named(events, "data")[0]["examples"] == 12
    begun = named(events, "begun")[0]
    steps = named(events, "step")
    assert [event["step"] for event in steps] == list(range(1, begun["steps"] + 1)) == list(range(1, 37))
    assert done["trained_tokens"] == sum(event["tokens"] for event in steps) > 0
    losses = [event["loss"] for event in named(events, "validation")]
    assert len(losses) == 7
    assert losses[-1] < 0.7 * losses[0]
    assert ("margin" in steps[0]) == (method == "dpo")
    plan = named(events, "plan")[0]
    assert (plan["sparsity"], plan["sites"], plan["batch_size"], plan["learning_rate_multiplier"]) == (
        "top-1",
        7,
        2,
        20,
    )
    tokens = [1, 5, 9, 30]
    model, adapter = Path(str(facts["model"])), Path(done["adapter"])
    assert divergence(true_logits(model, tokens), true_logits(model, tokens, adapter))[0] > 1e-3
    table = Path(done["metrics"]).read_text().splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [line.split(",")[0] for line in table[1:]] == [str(step) for step in range(37)]
    assert table[7].split(",")[3] == f"{losses[1]:.5f}"


def test_what_is_not_said_is_chosen(facts: dict[str, object], tmp_path: Path) -> None:
    """By an analysis of the model, which is kept and not made again."""
    kept = tmp_path / "plans" / "analysis.json"
    status, events = run(**facts, row_tokens=128, analysis=str(kept))
    assert status == 0
    assert named(events, "analysing")
    plan = named(events, "plan")[0]
    assert plan["epochs"] > 3  # few examples are read more often
    assert kept.is_file()
    again = run(**facts, row_tokens=128, analysis=str(kept))[1]
    assert not named(again, "analysing")
    assert named(again, "plan")[0] == plan
    kept.write_text("{}")
    assert named(run(**facts, row_tokens=128, epochs=1, analysis=str(kept))[1], "analysing")


def test_a_plan_alone_trains_nothing(facts: dict[str, object]) -> None:
    status, events = run(**facts, row_tokens=128, only_plan=True)
    assert status == 0
    assert {event["layer"] for event in named(events, "contribution")} == set(
        range(len(named(events, "contribution")) // 7)
    )
    schemes = named(events, "scheme")
    assert [one["chosen"] for one in schemes].count(True) == 1
    assert next(one["text"] for one in schemes if one["chosen"]) == named(events, "plan")[0]["sparsity"]
    assert max(one["share"] for one in schemes) == pytest.approx(1)
    assert not named(events, "step")
    assert not Path(str(facts["output"])).exists()


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been(facts: dict[str, object], tmp_path: Path) -> None:
    state = tmp_path / "state"
    whole = run(**facts, **SMALL)[1]
    expected = {event["step"]: event["loss"] for event in named(whole, "step")}
    table = Path(whole[-1]["metrics"]).read_text()
    first = run_until("step", 2, "stop\n", **facts, **SMALL, state=str(state))
    assert first[-1]["event"] == "stopped"
    assert state.stat().st_mode & 0o777 == 0o700
    status, second = run(**facts, **SMALL, state=str(state))
    assert status == 0
    assert named(second, "begun")[0]["step"] == first[-1]["step"]
    seen = {event["step"]: event["loss"] for event in named(first + second, "step")}
    assert seen == pytest.approx(expected, rel=1e-3)
    assert len(Path(second[-1]["metrics"]).read_text().splitlines()) == len(table.splitlines())


@pytest.mark.parametrize("number", [1, 4, 7])
def test_a_killed_run_repeats_at_most_one_interval(facts: dict[str, object], tmp_path: Path, number: int) -> None:
    spec = facts | SMALL | {"state": str(tmp_path / "state"), "checkpoint_steps": 2}
    first = run_until("step", number, signal.SIGKILL, **spec)
    saved = max((event["step"] for event in named(first, "checkpoint")), default=0)
    status, second = run(**spec)
    assert status == 0
    begun = named(second, "begun")[0]["step"]
    assert begun >= saved  # a checkpoint may be whole that was not told any more
    assert number - begun <= 3  # two of an interval, and what the pipe still held
    assert [event["step"] for event in named(second, "step")] == list(range(begun + 1, 10))


def test_each_epoch_leaves_an_adapter(facts: dict[str, object], tmp_path: Path) -> None:
    events = run(**facts, **SMALL, state=str(tmp_path / "state"))[1]
    adapters = [event["adapter"] for event in named(events, "checkpoint") if event["adapter"]]
    assert [Path(path).name for path in adapters] == ["adapter-3.gguf", "adapter-6.gguf", "adapter-9.gguf"]
    assert describe(Path(adapters[0])).adapter is not None
    assert Path(adapters[2]).read_bytes() == Path(events[-1]["adapter"]).read_bytes()


def test_the_parents_end_is_a_stop(facts: dict[str, object], tmp_path: Path) -> None:
    process = start(facts | SMALL | {"epochs": 50, "state": str(tmp_path / "state")})
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdout.readline()
        process.stdin.close()
        events = [json.loads(line) for line in process.stdout]
    assert events[-1]["event"] == "stopped"
    assert process.returncode == 0


def test_what_is_wrong_is_told_and_nothing_is_written(facts: dict[str, object], tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled.jsonl"
    spoiled.write_text(Path(str(facts["data"])).read_text() + "{no JSON\n")
    for wrong, code, words in (
        ({"data": str(spoiled)}, "invalid_training_file", "line 13"),
        ({"data": str(tmp_path / "gone.jsonl")}, "invalid_training_file", "cannot be read"),
        ({"sparsity": "top-1:head"}, "invalid_value", "no matrix is called 'head'"),
        ({"sparsity": "7-90"}, "invalid_value", "the model has layers 0 to"),
        ({"epochs": 0}, "invalid_value", "epochs must be at least 1"),
        ({"colour": "red"}, "invalid_value", "no field 'colour'"),
        ({"memory_budget_bytes": 1 << 20}, "invalid_value", "memory budget of 1 MiB is too small"),
        ({"output": str(tmp_path / "model.gguf" / "a.gguf")}, "disk_full", "cannot be written"),
        ({"state": str(tmp_path / "model.gguf" / "state")}, "disk_full", "cannot be used"),
    ):
        status, events = run(**{**facts, **SMALL, "epochs": 1, **wrong})
        assert status == 1
        assert (events[-1]["event"], events[-1]["code"]) == ("failed", code)
        assert words in events[-1]["message"]
    assert not Path(str(facts["output"])).exists()


def test_a_run_is_not_gone_on_with_on_other_grounds(facts: dict[str, object], tmp_path: Path) -> None:
    spec = facts | SMALL | {"state": str(tmp_path / "state")}
    run_until("step", 1, "stop\n", **spec)
    events = run(**{**spec, "seed": 4})[1]
    assert events[-1]["code"] == "invalid_value"
    assert "of another run: seed" in events[-1]["message"]
    write_tiny_llama(Path(str(facts["model"])), seed=9)
    events = run(**spec)[1]
    assert events[-1]["code"] == "model_changed"
