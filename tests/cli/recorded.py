"""A trainer that says what was recorded, and `edgellm tune` as it is called in tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from edgellm.config import home_dir
from edgellm.errors import (
    EdgeLLMError,
)
from edgellm.tune.process import Outcome
from edgellm.tune.spec import RunSpec
from serving.cli.tune import tune_app
from tests.support.tiny_gguf import write_tiny_lora

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
