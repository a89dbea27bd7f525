"""`edgellm draft make`: the run, in a process of its own, and what is told of it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from edgellm.config import load_settings, parse_seconds
from edgellm.engine.threads import default_threads
from edgellm.errors import ConfigError, EdgeLLMError, NotInstalledError
from edgellm.models.bundled import DEFAULT_MODEL
from edgellm.models.store import ModelStore
from edgellm.tune.draft.cut import Choice
from edgellm.tune.draft.spec import DraftSpec
from edgellm.tune.own_process import CHILD
from edgellm.tune.process import torch_missing

Event = Mapping[str, Any]
_INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended
_NAMES = {"whole": "the whole model", "cut": "cut, untrained", "drafter": "the drafter"}


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """What the command line asks for. None: by the settings."""

    source: str | None
    target: str
    data: Path
    output: Path
    layers: int
    choice: Choice
    vocabulary: int  # 0: the source's
    weights: str
    epochs: int
    time: str | None
    learning_rate: float
    softness: float
    answer_tokens: int
    low_priority: bool
    seed: int
    threads: int | None

    def spec(self) -> DraftSpec:
        """What the process is told. Raises ConfigError, ModelNotFoundError."""
        store, data, output = ModelStore(), self.data.expanduser().absolute(), self.output.expanduser().absolute()
        if not data.is_file():
            raise ConfigError(f"--data: there is no file {data}")
        if not output.parent.is_dir():
            raise ConfigError(f"--output: there is no folder {output.parent}")
        try:
            time_s = None if self.time is None else float(parse_seconds(self.time))
        except ValueError as error:
            raise ConfigError(f"--time: {error}") from None
        source, target = (store.find(name).path.absolute() for name in (self.source or DEFAULT_MODEL, self.target))
        if output in (source, target):
            raise ConfigError("--output: the drafter would take the place of a model that it is made from")
        return DraftSpec(
            source=str(source),
            target=str(target),
            data=str(data),
            output=str(output),
            layers=self.layers,
            choice=self.choice,
            vocabulary=self.vocabulary or None,
            type=self.weights,
            epochs=self.epochs,
            time_s=None if time_s == math.inf else time_s,
            learning_rate=self.learning_rate,
            softness=self.softness,
            answer_tokens=self.answer_tokens,
            low_priority=self.low_priority,
            seed=self.seed,
            threads=load_settings(threads=self.threads).threads or default_threads(),
        )


def run_make(request: DraftRequest, *, as_json: bool) -> None:
    """Makes and measures the drafter. Raises EdgeLLMError; typer.Exit with 130 if it was stopped before training."""
    if torch_missing():
        raise NotInstalledError("making a drafter needs torch: pip install 'edgellm[tune]'")
    last: Event = {"event": "none"}
    for event in _events(request.spec(), sys.stderr if as_json else sys.stdout):
        last = event
        if as_json:
            typer.echo(json.dumps(event))
        else:
            for line in told(event):
                typer.echo(line)
    match last["event"]:
        case "done":
            if not as_json:
                _tell(last, request)
        case "failed":
            raise EdgeLLMError(last["message"])
        case "stopped":
            typer.echo("edgellm: stopped before there was anything to write.", err=True)
            raise typer.Exit(_INTERRUPTED)
        case _:
            raise EdgeLLMError("the process that makes the drafter has ended unexpectedly")


def _events(spec: DraftSpec, notes: Any) -> Iterator[Event]:
    """What the process tells. Ctrl-C asks it to stop, a second one kills it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edgellm.tune.draft", spec.to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, CHILD: "1"},
        start_new_session=True,  # the terminal's Ctrl-C is for us
    )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("there are no pipes to the process")
    asked = 0

    def stop(*_: object) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            process.kill()
            return
        notes.write("stopping; Ctrl-C again to stop at once\n")
        process.stdin.write("stop\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]

    try:
        with _on_signals(stop):
            for line in process.stdout:
                yield json.loads(line)
        process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@contextmanager
def _on_signals(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)


def told(event: Event) -> Iterator[str]:
    """The lines that are worth telling of an event."""
    match event["event"]:
        case "cut":
            layers = ", ".join(map(str, event["layers"]))
            millions = event["parameters"] / 1e6
            yield f"cut: layers {layers}, {event['vocabulary']:,} tokens, {millions:.1f} million parameters"
        case "answers":
            yield f"the target has answered {event['done']} of {event['total']}"
        case "read":
            yield f"the target has read {event['done']} of {event['total']} answers"
        case "data":
            train = f"{event['train_answers']} answers to learn ({event['train_tokens']:,} tokens)"
            yield f"{train}, {event['held_answers']} held out ({event['held_tokens']:,})"
        case "look":
            trained = "" if event["train_loss"] is None else f"loss {event['train_loss']:.3f}, "
            held = f"held out {event['loss']:.3f}, {event['right']:.1%} right"
            yield f"step {event['step']}/{event['steps']}: {trained}{held}, {event['seconds']:.0f} s"
        case "measured":
            yield f"measured {_NAMES[event['what']]}"


def _tell(done: Event, request: DraftRequest) -> None:
    """What it is good for, and where it is."""
    if "drafter" in done:
        columns = ("", "accepted", "tokens a call", "break-even", "ms a token", "of the target's", "speed-up")
        table = Table(*columns, box=None, header_style="bold")
        for name, label in _NAMES.items():
            row = done[name]
            table.add_row(
                label,
                f"{row['acceptance']:.1%}",
                f"{row['tokens_a_call']:.2f}",
                f"{row['break_even']:.2f}",
                f"{row['token_s'] * 1e3:.2f}",
                f"{row['cost']:.3f}",
                f"{row['speed_up']:.2f}",
            )
        Console().print(table)
        if done["drafter"]["speed_up"] < 1:
            typer.echo("It does not pay for this target on this machine: more answers and more time may help.")
    typer.echo(f"the drafter: {request.output}")
    typer.echo(f"draft with it: edgellm serve --model '{request.target}' --draft '{request.output}'")
