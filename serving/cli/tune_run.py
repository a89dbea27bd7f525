"""`edgellm tune`: the run, in a process of its own, from the options to the adapter."""

from __future__ import annotations

import math
import queue
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import typer

from edgellm.config import home_dir, load_settings, parse_bytes, parse_seconds
from edgellm.engine.threads import default_threads
from edgellm.errors import (
    BaseChangedError,
    ConfigError,
    EdgeLLMError,
    ModelUnsupportedError,
    NotInstalledError,
    StorageError,
)
from edgellm.models.bundled import DEFAULT_MODEL
from edgellm.models.store import ModelStore, StoredModel
from edgellm.tune.examples import Method
from edgellm.tune.places import analysis_path
from edgellm.tune.process import Outcome, TrainerProcess, torch_missing
from edgellm.tune.spec import RunSpec
from serving.cli.tune_place import Target, Workplace, file_hashes
from serving.cli.tune_table import PlanView, choose_plan_view
from serving.cli.tune_view import Event, JsonView, View, choose_view, many

_News = Event | Outcome | signal.Signals | BaseException
_INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended
_ERRORS: dict[str, type[EdgeLLMError]] = {
    "invalid_value": ConfigError,
    "model_changed": BaseChangedError,
    "model_unsupported": ModelUnsupportedError,
    "disk_full": StorageError,
}
_HOPELESS = frozenset({"invalid_training_file", "invalid_value", "model_unsupported", "model_changed"})


@dataclass(frozen=True, slots=True)
class TuneRequest:
    """What the command line asks for. None: chosen by the trainer, or by the settings."""

    model: str | None
    data: Path
    validation: Path | None = None
    memory: str | None = None
    time: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    rank: int | None = None
    sparsity: str = "auto"
    method: Method = "supervised"
    beta: float | None = None
    seed: int = 0
    threads: int | None = None

    def find_model(self) -> StoredModel:
        """Raises ModelNotFoundError, ConfigError."""
        configured = load_settings().model
        return ModelStore().find(self.model or (configured[0] if configured else DEFAULT_MODEL))

    def spec(self, model: StoredModel, output: Path) -> RunSpec:
        """What the trainer is told. Raises ConfigError."""
        if self.beta is not None and self.method != "dpo":
            raise ConfigError("--beta goes with --method dpo")
        try:
            memory = None if self.memory is None else int(parse_bytes(self.memory))
        except ValueError as error:
            raise ConfigError(f"--memory: {error}") from None
        try:
            time_s = None if self.time is None else float(parse_seconds(self.time))
        except ValueError as error:
            raise ConfigError(f"--time: {error}") from None
        return RunSpec(
            model=str(model.path),
            data=str(self.data.expanduser().absolute()),
            output=str(output),
            validation=None if self.validation is None else str(self.validation.expanduser().absolute()),
            method=self.method,
            beta=self.beta,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate_multiplier=self.learning_rate_multiplier,
            rank=self.rank,
            sparsity=self.sparsity,
            memory_budget_bytes=memory,
            time_budget_s=None if time_s == math.inf else time_s,
            seed=self.seed,
            threads=load_settings(threads=self.threads).threads or default_threads(),
        )


def run_tune(request: TuneRequest, *, name: str | None, output: Path | None, as_json: bool) -> None:
    """Trains and keeps the adapter. Raises EdgeLLMError; typer.Exit with 130 if it was stopped."""
    _need_torch()
    model = request.find_model()
    target = Target.choose(model, request.data, name, output)
    spec = request.spec(model, Path())
    hashes = file_hashes(spec.model, [path for path in (spec.data, spec.validation) if path])
    with Workplace({**asdict(spec), "files": hashes}) as place:
        analysis = str(analysis_path(home_dir(), hashes[0]))
        spec = replace(spec, output=str(place.adapter), state=str(place.state), analysis=analysis)
        with choose_view(as_json=as_json) as view:
            if target.path.exists():
                view.say(f"{target.path} will be replaced")
            course = _train(spec, view)
        if course.done is None:
            _give_up(course, spec, place)
        target.keep(Path(course.done["adapter"]), Path(course.done["metrics"]), model)
        place.remove()
    _tell(view, course.done, target, request.model)


def _give_up(course: _Course, spec: RunSpec, place: Workplace) -> NoReturn:
    """Keeps what the same command can go on with, and nothing else."""
    if not course.saved or (course.outcome and course.outcome.code in _HOPELESS):
        place.remove()
        _fail(course, spec, "")
    _fail(course, spec, f"The same command goes on from the last checkpoint, in {place.folder}.")


def run_plan(request: TuneRequest, *, as_json: bool) -> None:
    """Analyses and prints. Raises EdgeLLMError; typer.Exit with 130 if it was stopped."""
    _need_torch()
    with tempfile.TemporaryDirectory(prefix="edgellm-plan-") as folder:
        spec = request.spec(request.find_model(), Path(folder, "adapter.gguf"))
        model_hash, _ = file_hashes(spec.model, [spec.data])
        spec = replace(spec, only_plan=True, analysis=str(analysis_path(home_dir(), model_hash)))
        with choose_plan_view(as_json=as_json) as view:
            course = _train(spec, view)
    if course.done is None:
        _fail(course, spec, "")
    if isinstance(view, PlanView):
        view.print()
    else:
        view.show(course.done)


def _need_torch() -> None:
    if torch_missing():
        raise NotInstalledError("fine-tuning needs torch: pip install 'edgellm[tune]'")


@dataclass(slots=True)
class _Course:
    """A run as far as it has come."""

    begun: bool = False
    saved: bool = False  # there is a checkpoint
    done: Event | None = None  # the event of that name, which is not shown yet
    interrupts: int = 0
    outcome: Outcome | None = None

    def take(self, event: Event) -> None:
        """Any event."""
        match event["event"]:
            case "begun":
                self.begun, self.saved = True, event["step"] > 0
            case "checkpoint":
                self.saved = True
            case "done":
                self.done = event


def _train(spec: RunSpec, view: View) -> _Course:
    """Runs the trainer to its end. Ctrl-C asks it to stop, a second one kills it."""
    happened: queue.SimpleQueue[_News] = queue.SimpleQueue()
    course = _Course()
    with _signals_into(happened), TrainerProcess(spec, happened.put) as process:
        threading.Thread(target=_wait, args=(process, happened), name="edgellm-tune-wait", daemon=True).start()
        while not isinstance(news := happened.get(), Outcome):
            if isinstance(news, BaseException):
                raise news
            if isinstance(news, signal.Signals):
                course.interrupts += 1
                _interrupt(process, view, course)
                continue
            course.take(news)
            if news["event"] != "done":
                view.show(news)
    course.outcome = news
    return course


def _wait(process: TrainerProcess, happened: queue.SimpleQueue[_News]) -> None:
    try:
        happened.put(process.wait())
    except BaseException as error:
        happened.put(error)


def _interrupt(process: TrainerProcess, view: View, course: _Course) -> None:
    if course.begun and course.interrupts == 1:
        view.say("stopping after this step; Ctrl-C again to stop at once")
        process.stop()
    else:  # before the first step nothing is lost
        process.kill()


@contextmanager
def _signals_into(happened: queue.SimpleQueue[_News]) -> Iterator[None]:
    """SIGINT and SIGTERM come as news: nothing is interrupted half-way. `put` is safe in a handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda number, _: happened.put(signal.Signals(number)))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(course: _Course, spec: RunSpec, going_on: str) -> NoReturn:
    """Says why there is no result. `going_on`: what can be done about it, or nothing."""
    outcome = course.outcome or Outcome("died")
    if course.interrupts:
        typer.echo(f"edgellm: stopped. {going_on}".rstrip(), err=True)
        raise typer.Exit(_INTERRUPTED)
    if outcome.faults:
        path = spec.validation if outcome.param == "validation_file" else spec.data
        for line, text in outcome.faults:
            typer.echo(f"{path}:{line}: {text}" if line else f"{path}: {text}", err=True)
        raise ConfigError(f"{path} cannot be used: {many(len(outcome.faults), 'fault')}")
    message = outcome.message
    if outcome.out_of_memory:
        message = "there was not enough memory; a smaller --memory, or --sparsity top-2, needs less"
    if going_on:
        message = f"{message.rstrip('.')}. {going_on}"
    raise _ERRORS.get(outcome.code, EdgeLLMError)(message)


def _tell(view: View, done: Event, target: Target, model: str | None) -> None:
    """Where everything is, and what to do with it."""
    command = target.command(model)
    if isinstance(view, JsonView):
        places = {"adapter": str(target.path), "metrics": str(target.metrics), "picture": str(target.picture)}
        view.show({**done, **places, "name": target.name, "serve": command})
        return
    view.say(f"{target.name} is ready: {target.path}")
    view.say(f"loss curve: {target.picture}")
    view.say(f"serve it: {command}")
