"""`edgellm tune`: what it asks of the trainer, shows and keeps; recorded events stand for the trainer's where fixed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from edgellm.config import home_dir
from edgellm.errors import (
    BaseChangedError,
    ConfigError,
    EdgeLLMError,
    ModelNotFoundError,
    ModelUnsupportedError,
    StorageError,
)
from edgellm.models.store import AdapterStore
from edgellm.tune.curve import read_curve
from edgellm.tune.process import Outcome
from edgellm.tune.spec import RunSpec
from serving.cli import tune_place, tune_run
from serving.cli.tune import tune_app
from serving.cli.tune_place import Workplace
from serving.cli.tune_table import bar
from serving.cli.tune_view import LiveView, Pace, duration
from tests.serving.server import EDGELLM, START_S, environment, run_edgellm, serving
from tests.support.tiny_gguf import write_tiny_llama, write_tiny_lora

DATA = {"event": "data", "examples": 12, "tokens": 500, "answer_tokens": 60, "cut": 1, "left_out": 0}
NOTICE = {"event": "notice", "line": 7, "message": "cut from 600 to 512 tokens"}
PLAN = {
    "event": "plan", "layers": [1, 2], "sites": 14, "parameters": 12_345, "sparsity": "top-2", "epochs": 3,
    "batch_size": 4, "learning_rate": 5e-4, "learning_rate_multiplier": 1.0, "rank": 8, "alpha": 16.0,
    "memory_bytes": 100 << 20, "recompute": False,
}  # fmt: skip
CSV = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,3.0,0.1,,\n2,2.0,0.2,2.5,0.3\n"


def step(number: int, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    event = {"event": "step", "step": number, "epoch": number / 2, "loss": loss, "accuracy": 0.5, "tokens": 20}
    return {**event, "all_tokens": 100, "learning_rate": 5e-4, "seconds": 0.5, "memory_bytes": 90 << 20, **more}


def begun(steps: int = 4, done: int = 0) -> dict[str, Any]:
    return {"event": "begun", "steps": steps, "step": done, "steps_per_epoch": 2}


SAVED = {
    "event": "checkpoint", "step": 1, "loss": 2.0, "accuracy": 0.5, "valid_loss": None, "valid_accuracy": None,
    "adapter": None,
}  # fmt: skip
VALIDATION = {"event": "validation", "step": 2, "loss": 2.5, "accuracy": 0.25}
USUAL = [DATA, NOTICE, PLAN, begun(), step(1), step(2), VALIDATION, step(3), step(4)]
Act = Callable[["Recorded"], None]


class Recorded:
    """A trainer that says what was recorded: events, deeds, and at last how it ended."""

    script: list[dict[str, Any] | Act] = []
    end = Outcome("done")
    made: list[Recorded] = []

    def __init__(self, spec: RunSpec, on_event: Callable[[dict[str, Any]], None]) -> None:
        self.spec, self.on_event = asdict(spec), on_event
        self.stopped, self.killed = threading.Event(), threading.Event()
        self.made.append(self)

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def stop(self) -> None:
        self.stopped.set()

    def kill(self) -> None:
        self.killed.set()

    def wait(self) -> Outcome:
        for act in self.script:
            act(self) if callable(act) else self.on_event(act)
        return self.end


def finish(trainer: Recorded) -> None:
    """Writes what a run leaves, and says so."""
    adapter = Path(trainer.spec["output"])
    write_tiny_lora(adapter, Path(trainer.spec["model"]))
    metrics = adapter.with_name("metrics.csv")
    metrics.write_text(CSV)
    paths = {"adapter": str(adapter), "metrics": str(metrics)}
    trainer.on_event({"event": "done", **paths, "trained_tokens": 120, "steps": 4})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    monkeypatch.setattr(Recorded, "script", [*USUAL, finish])
    monkeypatch.setattr(Recorded, "end", Outcome("done"))
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(tune_run, "TrainerProcess", Recorded)
    monkeypatch.setattr(tune_run, "torch_missing", lambda: False)
    return Recorded


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "Base Model.gguf")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "My rows.jsonl")


def write_data(path: Path, count: int = 12) -> Path:
    """The same answer to every question."""
    talks = [
        {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": "the world is true"}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return path


def tune(*arguments: object) -> Result:
    return CliRunner().invoke(tune_app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def sound(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(result: Result) -> EdgeLLMError:
    assert isinstance(result.exception, EdgeLLMError), (result.output, result.exception)
    return result.exception


def works() -> list[Path]:
    """The folders of runs to go on with."""
    root = home_dir() / "tuning" / "cli"
    return sorted(root.iterdir()) if root.exists() else []


def test_the_adapter_is_stored_with_its_curve_and_metrics(recorded, model, data) -> None:
    shown = sound(tune("--model", model, "--data", data))
    adapter = AdapterStore().find("base-model-my-rows")
    assert adapter.source == "tuned"
    assert f"serve it: edgellm serve --model '{model}' --adapter base-model-my-rows" in shown
    assert str(adapter.path) in shown
    assert read_curve(adapter.path.with_name("base-model-my-rows.csv")).train == ((1, 3.0), (2, 2.0))
    picture = adapter.path.with_name("base-model-my-rows.svg")
    assert str(picture) in shown
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert works() == []


def test_what_is_told_to_the_trainer(recorded, model, data, tmp_path) -> None:
    sound(tune("--model", model, "--data", data))
    spec = recorded.made[-1].spec
    assert spec["model"] == str(model)
    assert spec["data"] == str(data)
    auto = ("validation", "beta", "epochs", "batch_size", "learning_rate_multiplier", "rank", "memory_budget_bytes")
    assert {name: spec[name] for name in auto} == dict.fromkeys(auto)
    assert (spec["sparsity"], spec["method"], spec["seed"]) == ("auto", "supervised", 0)
    valid = write_data(tmp_path / "valid.jsonl")
    options = (
        "--epochs 5 --batch-size 2 --learning-rate-multiplier 0.5 --rank 4 --sparsity top-8 --method dpo --beta 0.2"
    )
    sound(tune("--model", model, "--data", data, *options.split(), "--seed", 7, "--memory", "2GiB", "--threads", 3,
               "--validation", valid))  # fmt: skip
    expected = {
        "epochs": 5, "batch_size": 2, "learning_rate_multiplier": 0.5, "rank": 4, "sparsity": "top-8", "method": "dpo",
        "beta": 0.2, "seed": 7, "memory_budget_bytes": 2 << 30, "threads": 3, "validation": str(valid),
    }  # fmt: skip
    assert {name: recorded.made[-1].spec[name] for name in expected} == expected


def test_an_output_of_ones_own(recorded, model, data, tmp_path) -> None:
    path = tmp_path / "my adapter.v2.gguf"
    shown = sound(tune("--model", model, "--data", data, "--output", path))
    assert {file.name for file in tmp_path.glob("my*")} == {f"my adapter.v2.{end}" for end in ("gguf", "svg", "csv")}
    assert f"--adapter 'my-adapter.v2={path}'" in shown
    assert AdapterStore().list() == []
    assert f"{path} will be replaced" in sound(tune("--model", model, "--data", data, "--output", path))


def test_outputs_that_cannot_be_are_told_before_the_run(recorded, model, data, tmp_path) -> None:
    for path, words in (
        (model, "is no adapter"),
        (data, "should end in .gguf"),
        (tmp_path / "nowhere" / "a.gguf", "cannot be written"),
    ):
        before = path.read_bytes() if path.exists() else None
        assert words in str(refused(tune("--model", model, "--data", data, "--output", path)))
        assert (path.read_bytes() if path.exists() else None) == before
    for name in ("a/b", "../a", "", "x" * 101, "smollm2-135m-instruct"):
        assert "--name" in str(refused(tune("--model", model, "--data", data, "--name", name)))
    assert recorded.made == []


def test_plain_lines_where_there_is_no_terminal(recorded, model, data) -> None:
    lines = sound(tune("--model", model, "--data", data)).splitlines()
    assert lines[:3] == [
        "12 examples, 500 tokens, 60 in answers",
        "line 7: cut from 600 to 512 tokens",
        "trains 14 matrices in layers 1-2 (12,345 parameters, rank 8) for 3 epochs of 4 examples a step, "
        "learning rate 0.0005, in about 100 MiB",
    ]
    assert "step 2: validation loss 2.5000, 25.0% right" in lines
    assert "step 3/4, epoch 1.50: loss 2.000, validation 2.500, 200 tokens/s, 90 MiB, 0 s left" in lines
    assert "\x1b" not in "".join(lines)


def test_json_prints_the_events_as_they_come(recorded, model, data) -> None:
    events = [json.loads(line) for line in sound(tune("--model", model, "--data", data, "--json")).splitlines()]
    assert events[:-1] == USUAL
    done = events[-1]
    assert (done["event"], done["trained_tokens"], done["name"]) == ("done", 120, "base-model-my-rows")
    assert [Path(done[name]).suffix for name in ("adapter", "metrics", "picture")] == [".gguf", ".csv", ".svg"]
    assert all(Path(done[name]).is_file() for name in ("adapter", "metrics", "picture"))
    assert done["serve"].endswith("--adapter base-model-my-rows")


def interrupt(trainer: Recorded) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_with_a_checkpoint_and_the_same_command_goes_on(recorded, model, data, monkeypatch) -> None:
    def stop(trainer: Recorded) -> None:
        assert trainer.stopped.wait(60)
        assert not trainer.killed.is_set()
        Path(trainer.spec["state"], "checkpoint").write_text("of step 1")

    recorded.script[:] = [begun(), step(1), interrupt, stop, SAVED, {"event": "stopped", "step": 1}]
    monkeypatch.setattr(recorded, "end", Outcome("stopped"))
    result = tune("--model", model, "--data", data)
    assert result.exit_code == 130
    assert "stopping after this step" in result.stdout
    assert "The same command goes on" in result.stderr
    assert AdapterStore().list() == []
    (work,) = works()
    assert str(work) in result.stderr

    def resume(trainer: Recorded) -> None:
        assert Path(trainer.spec["state"], "checkpoint").read_text() == "of step 1"

    recorded.script[:] = [resume, begun(done=1), step(2), finish]
    monkeypatch.setattr(recorded, "end", Outcome("done"))
    assert "goes on after step 1 of 4" in sound(tune("--model", model, "--data", data, "--name", "another-name"))
    assert works() == []


def test_a_second_ctrl_c_kills(recorded, model, data, monkeypatch) -> None:
    def twice(trainer: Recorded) -> None:
        interrupt(trainer)
        assert trainer.stopped.wait(60)
        interrupt(trainer)
        assert trainer.killed.wait(60)

    recorded.script[:] = [begun(), SAVED, twice]
    monkeypatch.setattr(recorded, "end", Outcome("died", "server_error", "killed by signal 9", signal=9))
    result = tune("--model", model, "--data", data)
    assert result.exit_code == 130
    assert len(works()) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_first_step_ends_at_once(recorded, model, data, monkeypatch) -> None:
    def once(trainer: Recorded) -> None:
        interrupt(trainer)
        assert trainer.killed.wait(60)
        assert not trainer.stopped.is_set()

    recorded.script[:] = [DATA, once]
    monkeypatch.setattr(recorded, "end", Outcome("died", "server_error", "killed by signal 9", signal=9))
    for command in ((), ("plan",)):
        result = tune(*command, "--model", model, "--data", data)
        assert (result.exit_code, result.stderr) == (130, "edgellm: stopped.\n")
    assert works() == []


def test_what_failed_without_a_checkpoint_leaves_nothing(recorded, model, data, monkeypatch) -> None:
    failing(recorded, monkeypatch, Outcome("died", "server_error", "the trainer ended with status 1: no"))
    recorded.script.pop()
    assert str(refused(tune("--model", model, "--data", data))) == "the trainer ended with status 1: no"
    assert works() == []
    recorded.script[:] = [begun(done=1)]
    assert "The same command goes on" in str(refused(tune("--model", model, "--data", data)))
    assert len(works()) == 1


def test_another_state_is_not_mixed_up(recorded, model, data, monkeypatch) -> None:
    recorded.script[:] = [begun(), SAVED, {"event": "stopped", "step": 1}]
    monkeypatch.setattr(recorded, "end", Outcome("stopped"))
    tune("--model", model, "--data", data)
    assert len(works()) == 1
    tune("--model", model, "--data", data, "--name", "x")  # the name is no matter
    assert len(works()) == 1
    tune("--model", model, "--data", data, "--epochs", 2)
    assert len(works()) == 2
    data.write_text(data.read_text().replace("true", "trve"))  # of the same length
    tune("--model", model, "--data", data)
    assert len(works()) == 3
    write_tiny_llama(model, seed=5)
    tune("--model", model, "--data", data)
    assert len(works()) == 4


def test_the_same_run_twice_at_once(recorded, model, data) -> None:
    inner: list[Result] = []
    recorded.script[:] = [begun(), lambda trainer: inner.append(tune("--model", model, "--data", data)), finish]
    sound(tune("--model", model, "--data", data))
    assert "another process" in str(refused(inner[0]))
    assert len(recorded.made) == 1


def test_folders_of_long_ago_are_removed(tmp_path, monkeypatch) -> None:
    with Workplace({"run": 1}) as old, Workplace({"run": 2}) as busy:
        pass
    long_ago_s = time.time() - 2 * tune_place._FORGOTTEN_S
    for place in (old, busy):
        os.utime(place.state, (long_ago_s, long_ago_s))
    with busy, Workplace({"run": 3}) as fresh:
        assert works() == sorted([busy.folder, fresh.folder])


def failing(recorded: type[Recorded], monkeypatch: pytest.MonkeyPatch, end: Outcome) -> None:
    recorded.script[:] = [begun(), SAVED]
    monkeypatch.setattr(recorded, "end", end)


def test_each_fault_of_the_data_is_a_line(recorded, model, data, monkeypatch) -> None:
    faults = ((13, "is no JSON"), (15, "has no messages"), (0, "too few"))
    failing(recorded, monkeypatch, Outcome("failed", "invalid_training_file", "all", "training_file", faults))
    result = tune("--model", model, "--data", data)
    assert result.stderr.splitlines() == [f"{data}:13: is no JSON", f"{data}:15: has no messages", f"{data}: too few"]
    assert str(refused(result)) == f"{data} cannot be used: 3 faults"
    assert works() == []
    failing(recorded, monkeypatch, Outcome("failed", "invalid_training_file", "all", "validation_file", faults[:1]))
    assert f"{model}:13" in tune("--model", model, "--data", data, "--validation", model).stderr


@pytest.mark.parametrize(
    ("end", "kind", "words", "kept"),
    [
        (Outcome("failed", "invalid_value", "at least 300 MiB are needed"), ConfigError, "at least 300 MiB", 0),
        (Outcome("failed", "model_unsupported", "no moe"), ModelUnsupportedError, "no moe", 0),
        (Outcome("failed", "model_changed", "another base"), BaseChangedError, "another base", 0),
        (Outcome("failed", "disk_full", "the disk is full"), StorageError, "The same command goes on", 1),
        (Outcome("died", "server_error", "killed by signal 9", signal=9), EdgeLLMError, "signal 9. The same", 1),
        (Outcome("died", "out_of_memory", "ran out", out_of_memory=True), EdgeLLMError, "a smaller --memory", 1),
    ],
)
def test_failures(recorded, model, data, monkeypatch, end, kind, words, kept) -> None:
    failing(recorded, monkeypatch, end)
    error = refused(tune("--model", model, "--data", data))
    assert isinstance(error, kind)
    assert words in str(error)
    assert len(works()) == kept
    assert AdapterStore().list() == []


def test_options_that_are_wrong(recorded, model, data, tmp_path) -> None:
    usual = ("--model", model, "--data", data)
    assert "--memory: not a size" in str(refused(tune(*usual, "--memory", "much")))
    assert "--beta" in str(refused(tune(*usual, "--beta", "0.1")))
    assert "cannot be read" in str(refused(tune("--model", model, "--data", tmp_path / "none.jsonl")))
    assert isinstance(refused(tune("--model", "none-such", "--data", data)), ModelNotFoundError)
    for wrong in ((), (*usual, "--epochs", 0), (*usual, "--method", "ppo"), (*usual, "plan", "--data", data)):
        assert tune(*wrong).exit_code == 2
    assert "must come after `plan`" in tune(*usual, "plan", "--data", data).output
    assert recorded.made == []


def test_without_torch(recorded, model, data, monkeypatch) -> None:
    monkeypatch.setattr(tune_run, "torch_missing", lambda: True)
    for command in ((), ("plan",)):
        assert "pip install 'edgellm[tune]'" in str(refused(tune(*command, "--model", model, "--data", data)))


def contribution(layer: int, tensor: str, gain: float) -> dict[str, Any]:
    return {"event": "contribution", "layer": layer, "tensor": tensor, "gain": gain}


def scheme(text: str, layers: list[int], share: float, chosen: bool) -> dict[str, Any]:
    facts = {"text": text, "layers": layers, "sites": 4, "parameters": 5_000, "share": share, "chosen": chosen}
    return {"event": "scheme", **facts, "memory_bytes": 50 << 20, "seconds": 125.0, "recompute": False}


ANALYSIS = [
    DATA,
    contribution(0, "attn_q", -0.1),
    contribution(1, "attn_v", 1.0),
    contribution(2, "ffn_up", 1.5),
    contribution(2, "attn_v", 1.5),
    scheme("top-2", [1, 2], 1.0, False),
    scheme("2-2:attn_v", [2, 2], 0.375, True),
    scheme("1:attn_v+2:attn_q,attn_k,attn_v,attn_output", [1, 2], 0.5, False),
    PLAN,
]


def test_the_plan_as_tables(recorded, model, data) -> None:
    done = {"event": "done", "adapter": None, "metrics": None, "trained_tokens": 0, "steps": 0}
    recorded.script[:] = [*ANALYSIS, lambda trainer: trainer.on_event(done)]
    lines = sound(tune("plan", "--model", model, "--data", data, "--memory", "1GiB")).splitlines()
    rows = [line.split() for line in lines]
    assert ["2", "█" * 24, "75.0%", "ffn_up", "37.5%,", "attn_v", "37.5%"] in rows
    assert ["1", "█" * 8, "25.0%", "attn_v", "25.0%"] in rows
    assert ["0", "0.0%"] in rows
    assert ["top-2", "1-2", "4", "5,000", "50", "MiB", "2", "min", "5", "s", "100%"] in rows
    assert ["→", "2-2:attn_v", "2-2", "4", "5,000", "50", "MiB", "2", "min", "5", "s", "38%"] in rows
    assert ["1:attn_v+2:attn_q,attn_k,at…", "1-2"] in [row[:2] for row in rows]
    assert lines[-1] == "the same without analysis: edgellm tune --sparsity top-2 ..."
    spec = recorded.made[-1].spec
    assert (spec["only_plan"], spec["state"], spec["memory_budget_bytes"]) == (True, None, 1 << 30)
    assert works() == []
    told = sound(tune("plan", "--model", model, "--data", data, "--json")).splitlines()
    assert [json.loads(line) for line in told] == [*ANALYSIS, done]


def test_bars() -> None:
    assert [bar(share) for share in (0, 1 / 192, 0.5, 1)] == ["", "▏", "█" * 12, "█" * 24]


def test_the_pace() -> None:
    pace = Pace()
    assert (pace.loss, pace.tokens_per_s, pace.left_s) == (None, None, None)
    for event in (begun(100, 10), step(11, 3.0, seconds=2.0), step(12, 1.0, seconds=1.0, all_tokens=500)):
        pace.take(event)
    assert pace.loss == pytest.approx((0.9 * 3 + 1) / 1.9)
    assert pace.tokens_per_s == pytest.approx(200)
    assert pace.left_s == pytest.approx(88 * 1.5)
    assert [duration(s) for s in (0.4, 59, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]


def test_a_bar_in_a_terminal() -> None:
    from rich.console import Console

    console = Console(force_terminal=True, width=80, record=True)
    with LiveView(console) as view:
        for event in USUAL:
            view.show(event)
        figures = list(view._bar.get_renderables())[1]
        assert str(figures) == "  loss 2.000  validation 2.500  200 tokens/s  90 MiB  0 s left"
        (task,) = view._bar.tasks
        assert (task.completed, task.total, task.description) == (4, 4, "epoch 2.00")
    assert "step 2: validation loss 2.5000" in console.export_text()


def answer(home: Path, model: Path, *options: str) -> str:
    done = run_edgellm(
        home, "chat", "-m", str(model), "--temperature", "0", "--max-tokens", "8", *options, stdin="hello 3"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_real_run_to_an_adapter_that_answers_as_trained(tmp_path, model, data) -> None:
    pytest.importorskip("torch")
    options = ["--model", str(model), "--data", str(data), "--learning-rate-multiplier", "10", "--epochs", "12"]
    done = run_edgellm(tmp_path, "tune", *options, "--validation", str(data), "--name", "Truth")
    assert done.returncode == 0, done.stderr
    assert "truth is ready" in done.stdout
    curve = read_curve(tmp_path / "adapters" / "truth.csv")
    assert len(curve.validation) == 13
    assert curve.validation[-1][1] < 0.1 * curve.validation[0][1]
    assert ElementTree.parse(tmp_path / "adapters" / "truth.svg")
    assert not list((tmp_path / "tuning" / "cli").iterdir())
    assert "the world is true" not in answer(tmp_path, model)
    assert answer(tmp_path, model, "--adapter", "truth") == "the world is true"
    path = tmp_path / "adapters" / "truth.gguf"
    assert answer(tmp_path, model, "--adapter", f"mine={path}") == "the world is true"


def test_a_real_run_stopped_and_gone_on_with(tmp_path, model, data) -> None:
    pytest.importorskip("torch")
    command = [EDGELLM, "tune", "--model", model, "--data", data, "--epochs", "40", "--json"]
    steps: list[int] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(tmp_path), text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step":
                steps.append(event["step"])
                if len(steps) == 3:
                    process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        told = process.stderr.read()
        assert process.wait(START_S) == 130, told
    assert "The same command goes on" in told
    assert event == {"event": "stopped", "step": steps[-1]}
    done = run_edgellm(tmp_path, *map(str, command[1:]))
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    begun = next(event for event in events if event["event"] == "begun")
    assert begun["step"] == steps[-1] < begun["steps"]
    curve = read_curve(Path(events[-1]["metrics"]))
    assert [number for number, _ in curve.train] == list(range(1, begun["steps"] + 1))


def test_real_faults(tmp_path, model, data) -> None:
    pytest.importorskip("torch")
    spoiled = tmp_path / "spoiled.jsonl"
    spoiled.write_text("{no JSON\n" + data.read_text() + "[]\n")
    done = run_edgellm(tmp_path, "tune", "--model", str(model), "--data", str(spoiled))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{spoiled}:1", f"{spoiled}:14", "edgellm"]
    done = run_edgellm(tmp_path, "tune", "--model", str(model), "--data", str(data), "--memory", "1MiB")
    assert done.returncode == 1
    assert "too small: at least about" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_real_plan(tmp_path, model, data) -> None:
    pytest.importorskip("torch")
    done = run_edgellm(tmp_path, "tune", "plan", "--model", str(model), "--data", str(data), "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    (chosen,) = [event for event in events if event["event"] == "scheme" and event["chosen"]]
    assert next(event for event in events if event["event"] == "plan")["sparsity"] == chosen["text"]
    shown = run_edgellm(tmp_path, "tune", "plan", "--model", str(model), "--data", str(data)).stdout
    assert "→" in shown
    assert sum("█" in line for line in shown.splitlines()) == 2


def test_serving_a_stored_adapter_by_its_name(tmp_path, model) -> None:
    adapter = write_tiny_lora(tmp_path / "a.gguf", model)
    AdapterStore(tmp_path).add(adapter, "mine")
    with serving(tmp_path, "--model", str(model), "--adapter", "mine", "--adapter", f"other={adapter}") as server:
        assert {row["id"] for row in server.get("/v1/adapters").json()["data"]} == {"mine", "other"}
    for name, words in (("yours", "There is no adapter 'yours'"), ("x=", "NAME=PATH"), ("=x", "NAME=PATH")):
        done = run_edgellm(tmp_path, "serve", "--port", "0", "--model", str(model), "--adapter", name)
        assert done.returncode == 1
        assert words in done.stderr
