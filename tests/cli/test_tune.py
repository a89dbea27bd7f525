"""`edgellm tune`: what it asks of the trainer, keeps and tells; recorded events stand for the trainer's."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import Result

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
from serving.cli import tune_place, tune_run
from serving.cli.tune_place import Workplace
from tests.cli.recorded import DATA, SAVED, Recorded, begun, finish, refused, sound, step, tune, works, write_data
from tests.support.tiny_gguf import write_tiny_llama


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
    auto = (
        "validation",
        "beta",
        "epochs",
        "batch_size",
        "learning_rate_multiplier",
        "rank",
        "memory_budget_bytes",
        "time_budget_s",
    )
    assert {name: spec[name] for name in auto} == dict.fromkeys(auto)
    assert (spec["sparsity"], spec["method"], spec["seed"]) == ("auto", "supervised", 0)
    valid = write_data(tmp_path / "valid.jsonl")
    options = (
        "--epochs 5 --batch-size 2 --learning-rate-multiplier 0.5 --rank 4 --sparsity top-8 --method dpo --beta 0.2"
    )
    sound(tune("--model", model, "--data", data, *options.split(), "--seed", 7, "--memory", "2GiB", "--time", "20m",
               "--threads", 3,
               "--validation", valid))  # fmt: skip
    expected = {
        "epochs": 5, "batch_size": 2, "learning_rate_multiplier": 0.5, "rank": 4, "sparsity": "top-8", "method": "dpo",
        "beta": 0.2, "seed": 7, "memory_budget_bytes": 2 << 30, "time_budget_s": 1200.0, "threads": 3,
        "validation": str(valid),
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
    before = signal.getsignal(signal.SIGINT)

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
    assert signal.getsignal(signal.SIGINT) == before


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


def test_folders_of_long_ago_are_removed() -> None:
    with Workplace({"run": 1}) as old, Workplace({"run": 2}) as busy:
        pass
    others = [old.folder.parent / "0-nothing", old.folder.parent / "a-file"]
    others[0].mkdir()
    others[1].touch()
    long_ago_s = time.time() - 2 * tune_place._FORGOTTEN_S
    for place in (old, busy):
        os.utime(place.state, (long_ago_s, long_ago_s))
    with busy, Workplace({"run": 3}) as fresh:
        assert works() == sorted([busy.folder, fresh.folder, *others])


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
    assert "--time: not a duration" in str(refused(tune(*usual, "--time", "soon")))
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
