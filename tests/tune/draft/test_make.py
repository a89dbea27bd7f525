"""`python -m edgellm.tune.draft` and `edgellm draft make` on tiny models, from data to a drafter that drafts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edgellm.backend.model import Model
from edgellm.errors import ConfigError, EdgeLLMError, TrainingDataError
from edgellm.models.describe import describe
from edgellm.tune.draft.run import ANSWERS, make_drafter
from edgellm.tune.draft.samples import read_rows
from edgellm.tune.draft.spec import DraftSpec
from tests.support.tiny_gguf import write_tiny_llama

_ANSWER = "the name of the user is in the world, and the world is in the name of the user "


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rows = [
        {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": _ANSWER}]}
        for n in range(12)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "source": write_tiny_llama(tmp_path / "source.gguf", layers=5, tied=True, seed=1),
        "target": write_tiny_llama(tmp_path / "target.gguf", architecture="qwen2", seed=2),
        "data": data,
        "output": tmp_path / "drafter.gguf",
    }


def _spec(files: dict[str, Path], **more: Any) -> DraftSpec:
    usual: dict[str, Any] = {
        "layers": 2,
        "vocabulary": 280,
        "epochs": 40,
        "pack_tokens": 256,
        "learning_rate": 3e-3,
        "softness": 0.5,
    }
    return DraftSpec(**{name: str(path) for name, path in files.items()}, **{**usual, "low_priority": False, **more})


def _make(spec: DraftSpec, stop: threading.Event | None = None) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    make_drafter(spec, events.append, stop or threading.Event())
    json.dumps(events, allow_nan=False)
    return events


def test_a_drafter_learns_what_the_target_says(files: dict[str, Path]) -> None:
    events = _make(_spec(files))
    assert [event["event"] for event in events if event["event"] != "look"] == [
        "cut", "read", "data", "measured", "measured", "measured", "done",
    ]  # fmt: skip
    done = events[-1]
    assert done["drafter"]["acceptance"] > 0.5 > 0.2 > done["cut"]["acceptance"]
    assert done["drafter"]["tokens_a_call"] > 1.5
    assert done["drafter"]["cost"] > 0
    info = describe(files["output"])
    assert (info.layers, info.vocabulary, info.quantisation) == (2, 280, "Q8_0")
    assert not Path(f"{files['output']}{ANSWERS}").exists()


def test_the_target_answers_what_has_no_answer(files: dict[str, Path]) -> None:
    rows = [{"prompt": [72, 101, 108, 108 + n]} for n in range(5)] + [{"prompt": [65], "answer": [66, 67, 68]}]
    files["data"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = _make(_spec(files, answer_tokens=12, epochs=1))
    assert {"event": "answers", "done": 5, "total": 5} in events
    model = Model(files["target"])
    kept = read_rows(Path(f"{files['output']}{ANSWERS}"), model.vocab.n_tokens)
    model.close()
    assert [row.prompt for row in kept] == [row["prompt"] for row in rows]
    assert all(0 < len(row.answer) <= 12 for row in kept)
    assert kept[-1].answer == [66, 67, 68]
    files["data"] = Path(f"{files['output']}{ANSWERS}")
    events = _make(_spec(files, epochs=1, softness=0.0))
    assert {"answers", "read"}.isdisjoint(event["event"] for event in events)


def test_stopped_before_training_nothing_is_written(files: dict[str, Path]) -> None:
    stop = threading.Event()
    stop.set()
    assert _make(_spec(files), stop)[-1] == {"event": "stopped"}
    assert not files["output"].exists()


def test_stopped_while_training_the_best_is_written(files: dict[str, Path]) -> None:
    stop, events = threading.Event(), []

    def report(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "look" and event["step"] > 0:
            stop.set()

    make_drafter(_spec(files), report, stop)
    assert (events[-1]["event"], events[-1]["stopped"]) == ("done", True)
    assert "drafter" not in events[-1]
    assert describe(files["output"]).layers == 2


def test_data_that_cannot_be_used(files: dict[str, Path]) -> None:
    files["data"].write_text('{"prompt": [1], "answer": [2]}\n')
    with pytest.raises(TrainingDataError, match="fewer than two"):
        _make(_spec(files))
    files["data"].write_text('{"prompt": [99999]}\n')
    with pytest.raises(TrainingDataError, match="line 1"):
        _make(_spec(files))


@pytest.mark.parametrize(
    "more",
    [{"layers": 0}, {"epochs": 0}, {"learning_rate": 0.0}, {"time_s": -1.0}, {"type": "F16"}, {"choice": "some"},
     {"held_share": 1.0}, {"softness": 1.5}],
)  # fmt: skip
def test_specifications_that_make_no_run(files: dict[str, Path], more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        _spec(files, **more)


def test_a_specification_travels(files: dict[str, Path]) -> None:
    spec = _spec(files, time_s=3.5, vocabulary=None)
    assert DraftSpec.parse(spec.to_json()) == spec
    for text in ("{", "[]", '{"source": "a"}', json.dumps({**json.loads(spec.to_json()), "more": 1})):
        with pytest.raises(ConfigError):
            DraftSpec.parse(text)


def test_the_process_tells_of_failures_in_one_line(files: dict[str, Path]) -> None:
    spec = _spec(files, layers=50)
    done = subprocess.run(
        [sys.executable, "-m", "edgellm.tune.draft", spec.to_json()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (event,) = map(json.loads, done.stdout.splitlines())
    assert event["event"] == "failed"
    assert "5 layers" in event["message"]


def test_the_command_shows_what_came_of_it(files: dict[str, Path]) -> None:
    done = _command(files, "--epochs", "40", "--learning-rate", "0.003")
    assert done.returncode == 0, done.stderr
    assert "cut: layers 0, 4, 280 tokens" in done.stdout
    assert "the drafter" in done.stdout
    assert f"--draft '{files['output']}'" in done.stdout


def test_the_command_as_json(files: dict[str, Path]) -> None:
    done = _command(files, "--epochs", "1", "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "done"
    assert {"whole", "cut", "drafter", "target"} <= set(events[-1])


def test_ctrl_c_ends_the_training_and_writes(files: dict[str, Path]) -> None:
    process = subprocess.Popen(
        [*_COMMAND, *_options(files), "--epochs", "1000", "--json"], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    last: dict[str, Any] = {}
    for line in process.stdout:
        last = json.loads(line)
        if last["event"] == "look" and last["step"] == 0:
            process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    process.stdout.close()
    assert (last["event"], last["stopped"]) == ("done", True)
    assert describe(files["output"]).layers == 2


_COMMAND = [sys.executable, "-c", "from serving.cli import main; main()", "draft", "make"]


def _options(files: dict[str, Path]) -> list[str]:
    named = {"--from": "source", "--target": "target", "--data": "data", "--output": "output"}
    paths = [text for option, name in named.items() for text in (option, str(files[name]))]
    return [*paths, "--layers", "2", "--vocabulary", "280", "--threads", "1"]


def _command(files: dict[str, Path], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_COMMAND, *_options(files), *more], capture_output=True, text=True, check=False)


def test_mistakes_are_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    wrong = {
        "data": tmp_path / "none.jsonl",
        "output": tmp_path / "none" / "out.gguf",
        "target": tmp_path / "none.gguf",
    }
    for name, path in wrong.items():
        done = _command({**files, name: path})
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
    done = _command({**files, "output": files["source"]})
    assert "take the place" in done.stderr
    assert describe(files["source"]).layers == 5


def test_without_torch_it_says_what_to_install(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.cli import draft_run

    monkeypatch.setattr(draft_run, "torch_missing", lambda: True)
    request = draft_run.DraftRequest(
        source=None, target="", data=files["data"], output=files["output"], layers=2, choice="even", vocabulary=0,
        weights="Q8_0", epochs=1, time=None, learning_rate=1e-3, softness=0.5, answer_tokens=8,
        low_priority=True, seed=0, threads=1,
    )  # fmt: skip
    with pytest.raises(EdgeLLMError, match=r"pip install 'edgellm\[tune\]'"):
        draft_run.run_make(request, as_json=False)
