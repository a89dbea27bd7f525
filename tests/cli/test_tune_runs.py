"""`edgellm tune` with the trainer itself, as processes."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from edgellm.models.store import AdapterStore
from edgellm.tune.curve import read_curve
from tests.serving.server import EDGELLM, START_S, environment, run_edgellm, serving
from tests.support.tiny_gguf import write_tiny_lora


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
