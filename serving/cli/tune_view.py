"""How a tuning run is shown while it goes on: a bar, plain lines, or JSON."""

from __future__ import annotations

import json
import math
import sys
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

Event = Mapping[str, Any]

_RECENT_STEPS = 32
_SMOOTHING = 0.9
_NOTICES_MAX = 10
_LINES = 20  # of steps, where there is no bar


class Pace:
    """What the steps so far say of the run."""

    def __init__(self) -> None:
        self.step = self.steps = 0
        self.epoch = 0.0
        self.memory_bytes = 0
        self.valid_loss: float | None = None
        self._loss = self._seen = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT_STEPS)  # seconds and tokens of each

    def take(self, event: Event) -> None:
        """Any event; those that say nothing of the pace do nothing."""
        match event["event"]:
            case "begun":
                self.step, self.steps = event["step"], event["steps"]
            case "step":
                self.step, self.epoch = event["step"], event["epoch"]
                self.memory_bytes = event["memory_bytes"]
                self._loss = _SMOOTHING * self._loss + (1 - _SMOOTHING) * event["loss"]
                self._seen = _SMOOTHING * self._seen + (1 - _SMOOTHING)
                self._recent.append((event["seconds"], event["all_tokens"]))
            case "validation":
                self.valid_loss = event["loss"]

    @property
    def loss(self) -> float | None:
        """Smoothed. None before the first step."""
        return self._loss / self._seen if self._seen else None

    @property
    def tokens_per_s(self) -> float | None:
        """Of the latest steps, questions included."""
        seconds = sum(seconds for seconds, _ in self._recent)
        return sum(tokens for _, tokens in self._recent) / seconds if seconds else None

    @property
    def left_s(self) -> float | None:
        """Seconds that the other steps take at the pace of the latest."""
        if not self._recent:
            return None
        return (self.steps - self.step) * sum(seconds for seconds, _ in self._recent) / len(self._recent)

    def figures(self) -> list[str]:
        """Loss, validation loss, speed, memory and time left, as far as they are known."""
        found = []
        if self.loss is not None:
            found.append(f"loss {self.loss:.3f}")
        if self.valid_loss is not None:
            found.append(f"validation {self.valid_loss:.3f}")
        if self.tokens_per_s is not None:
            found.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if self.memory_bytes:
            found.append(mebibytes(self.memory_bytes))
        if self.left_s is not None:
            found.append(f"{duration(self.left_s)} left")
        return found


class Teller:
    """The lines that are worth telling, whatever shows them."""

    def __init__(self) -> None:
        self._notices = 0

    def lines(self, event: Event) -> Iterable[str]:
        match event["event"]:
            case "data":
                answers = f"{event['answer_tokens']:,} in answers"
                yield f"{many(event['examples'], 'example')}, {event['tokens']:,} tokens, {answers}"
            case "notice":
                self._notices += 1
                if self._notices <= _NOTICES_MAX:
                    where = f"line {event['line']}: " if event["line"] else ""
                    yield f"{where}{event['message']}"
                elif self._notices == _NOTICES_MAX + 1:
                    yield "and so on: --json has all notices"
            case "analysing":
                yield "measuring what each layer would bring; this is kept for the model"
            case "plan":
                yield _plan(event)
            case "begun" if event["step"]:
                yield f"goes on after step {event['step']} of {event['steps']}"
            case "validation":
                yield f"step {event['step']}: validation loss {event['loss']:.4f}, {event['accuracy']:.1%} right"


def _plan(plan: Event) -> str:
    low, high = plan["layers"]
    return (
        f"trains {plan['sites']} matrices in layers {low}-{high} ({plan['parameters']:,} parameters, "
        f"rank {plan['rank']}) for {many(plan['epochs'], 'epoch')} of {many(plan['batch_size'], 'example')} a step, "
        f"learning rate {plan['learning_rate']:.2g}, in about {mebibytes(plan['memory_bytes'])}"
    )


class View(AbstractContextManager["View"]):
    """Shows a run's events. Nothing of it is left on the screen but lines once the block ends."""

    @abstractmethod
    def show(self, event: Event) -> None:
        """One event, as the trainer sent it."""

    @abstractmethod
    def say(self, text: str) -> None:
        """A line that is no event."""

    def __exit__(self, *_: object) -> None:
        return None


class JsonView(View):
    """Events on stdout as they are, other lines on stderr."""

    def show(self, event: Event) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()

    def say(self, text: str) -> None:
        sys.stderr.write(text + "\n")


class PlainView(View):
    """Lines on stdout, a few of the steps among them."""

    def __init__(self) -> None:
        self._pace, self._teller = Pace(), Teller()

    def show(self, event: Event) -> None:
        self._pace.take(event)
        for line in self._teller.lines(event):
            self.say(line)
        pace = self._pace
        if event["event"] == "step" and (pace.step % math.ceil(pace.steps / _LINES) == 0 or pace.step == pace.steps):
            self.say(f"step {pace.step}/{pace.steps}, epoch {pace.epoch:.2f}: {', '.join(pace.figures())}")

    def say(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


class LiveView(View):
    """A bar and the figures of the moment, lines above them. For terminals."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace, self._teller = Pace(), Teller()
        self._bar = _Bar(console, self._pace)
        self._task = self._bar.add_task("preparing", total=None)

    def __enter__(self) -> LiveView:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, event: Event) -> None:
        self._pace.take(event)
        for line in self._teller.lines(event):
            self.say(line)
        if event["event"] in ("begun", "step"):
            text = f"epoch {self._pace.epoch:.2f}"
            self._bar.update(self._task, total=self._pace.steps, completed=self._pace.step, description=text)

    def say(self, text: str) -> None:
        self._bar.console.print(Text(text), soft_wrap=True)


class _Bar(Progress):
    """Two lines: rich would squeeze all of it into one."""

    def __init__(self, console: Console, pace: Pace) -> None:
        self._pace = pace
        columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        super().__init__(*columns, console=console, transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text("  " + "  ".join(self._pace.figures()), style="dim", no_wrap=True, overflow="ellipsis")


def choose_view(*, as_json: bool) -> View:
    """The one that fits where stdout goes."""
    if as_json:
        return JsonView()
    console = Console()
    return LiveView(console) if console.is_terminal else PlainView()


def mebibytes(number: float) -> str:
    """`1,024 MiB`."""
    return f"{number / (1 << 20):,.0f} MiB"


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def many(count: int, noun: str) -> str:
    """`1 epoch`, `3 epochs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
