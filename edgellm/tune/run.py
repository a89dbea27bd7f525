"""One fine-tuning run, from a data file to an adapter: what the process `python -m edgellm.tune` does."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgellm.backend.model import Model
from edgellm.chat.template import ChatTemplate
from edgellm.errors import BaseChangedError, ConfigError, StorageError
from edgellm.models.describe import describe
from edgellm.models.files import sha256_file
from edgellm.tune.batches import Examples
from edgellm.tune.checkpoint import StateFolder
from edgellm.tune.coding import ModelCoder
from edgellm.tune.data import TrainingSet, load_file
from edgellm.tune.decoder import Decoder
from edgellm.tune.defaults import Hyperparameters, decide
from edgellm.tune.export import export_adapter
from edgellm.tune.hashes import ModelHashes
from edgellm.tune.history import History
from edgellm.tune.lora import Lora, LoraConfig
from edgellm.tune.objective import BETA
from edgellm.tune.own_process import MemoryWatch, thrifty_allocation
from edgellm.tune.planner import Planned, make_plan
from edgellm.tune.prefix_cache import PrefixCache
from edgellm.tune.scheme import parse_scheme
from edgellm.tune.spec import RunSpec
from edgellm.tune.trainer import StepMetrics, Trainer, TrainingPlan
from edgellm.tune.weights import BaseWeights, compute_type

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class _Data:
    training: Examples
    validation: Examples | None


def run(spec: RunSpec, report: Report, stop: threading.Event | None = None) -> None:
    """Trains, and writes the adapter. `report` is told what happens, as dictionaries with an "event".

    Once `stop` is set, ends behind the step at hand, with a checkpoint if there is a state folder.
    Raises TrainingDataError with the lines at fault, ConfigError, ModelUnsupportedError, BaseChangedError,
    StorageError if something cannot be written, and what reading a model raises; MemoryError or torch's RuntimeError
    where memory runs out.
    """
    if spec.memory_budget_bytes is not None:
        thrifty_allocation()
    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    data = _read(spec, report)
    with contextlib.ExitStack() as stack:
        folder = None if spec.state is None or spec.only_plan else StateFolder(Path(spec.state))
        if folder is not None:
            stack.callback(folder.close)
        run_ = _Run(spec, data, report, folder, stop or threading.Event())
        run_.prepare()
        if spec.only_plan:
            report({"event": "done", "adapter": None, "metrics": None, "trained_tokens": 0, "steps": 0})
            return
        stack.enter_context(run_.cache())
        run_.train()


class _Run:
    """The parts of a run, in the order in which they come to be."""

    def __init__(
        self, spec: RunSpec, data: _Data, report: Report, folder: StateFolder | None, stop: threading.Event
    ) -> None:
        self._spec, self._data, self._report, self._folder, self._stop = spec, data, report, folder, stop
        self._numbers: Hyperparameters
        self._history = History()
        self._trained_tokens = 0
        self._trainer: Trainer

    def prepare(self) -> None:
        """Decides what to train, or takes up what an earlier process had decided."""
        spec = self._spec
        saved = None
        if self._folder is not None:  # only checkpoints need to know, and models are large
            self._identity = _identity(spec)
            saved = self._folder.load()
        if saved is not None:
            _check_identity(saved["identity"], self._identity)
        self._decoder = Decoder(BaseWeights(Path(spec.model), threads=spec.threads), dtype=compute_type())
        self._numbers = decide(spec, len(self._data.training), self._decoder.shape.width)
        if saved is not None:
            self._plan = Planned(**saved["plan"])
        else:
            self._plan = make_plan(spec, self._decoder, self._data.training, self._numbers, self._report)
        self._saved = saved
        self._tell_plan()

    def _tell_plan(self) -> None:
        numbers, plan = self._numbers, self._plan
        sites = parse_scheme(plan.scheme, self._decoder.shape.layers)
        self._report(
            {
                "event": "plan",
                "layers": [sites[0].layer, sites[-1].layer],
                "sites": len(sites),
                "parameters": plan.parameters,
                "sparsity": plan.scheme,
                "epochs": numbers.epochs,
                "batch_size": numbers.batch_size,
                "learning_rate": numbers.learning_rate,
                "learning_rate_multiplier": numbers.learning_rate_multiplier,
                "rank": numbers.rank,
                "alpha": numbers.alpha,
                "memory_bytes": plan.memory_bytes,
                "recompute": plan.recompute,
            }
        )

    @contextlib.contextmanager
    def cache(self) -> Iterator[None]:
        """Makes the trainer, with a place for the frozen prefix's output if there is a prefix."""
        spec, numbers, decoder = self._spec, self._numbers, self._decoder
        decoder.recompute = self._plan.recompute
        sites = parse_scheme(self._plan.scheme, decoder.shape.layers)
        config = LoraConfig(numbers.rank, numbers.alpha, spec.rank_stabilised)
        lora = Lora(decoder.shape, sites, config, seed=spec.seed)
        cache = None
        if lora.lowest_layer > 0 and (numbers.epochs > 1 or self._data.validation is not None):
            every = [*self._data.training.sequences, *(self._data.validation or Examples((), 1)).sequences]
            place = self._folder.path if self._folder else Path(tempfile.gettempdir())
            with contextlib.suppress(OSError):  # no room: each epoch computes it again
                cache = PrefixCache(place, [len(sequence.tokens) for sequence in every], decoder.shape.width)
        plan = TrainingPlan(
            numbers.epochs,
            numbers.batch_size,
            numbers.learning_rate,
            seed=spec.seed,
            pack_tokens=self._plan.pack_tokens,
            beta=spec.beta or BETA,
        )
        trainer = Trainer(decoder, lora, self._data.training, plan, validation=self._data.validation, cache=cache)
        if self._saved is not None:
            trainer.restore(self._saved["trainer"])
            self._history = History(self._saved["history"])
            self._trained_tokens = int(self._saved["trained_tokens"])
            self._saved = None
        self._trainer = trainer
        self._memory = MemoryWatch(spec.memory_budget_bytes)
        try:
            yield
        finally:
            self._memory.close()
            if cache is not None:
                cache.close()

    def train(self) -> None:
        """The steps that are left, and what is written at the end."""
        trainer = self._trainer
        per_epoch, total = trainer.steps_per_epoch, trainer.total_steps
        self._report({"event": "begun", "steps": total, "step": trainer.done, "steps_per_epoch": per_epoch})
        if trainer.done == 0:
            self._validate()
        started = time.monotonic()
        for step in trainer.steps():
            self._tell_step(step, time.monotonic() - started)
            epoch_ends = step.step % per_epoch == 0
            if self._is_looked_at(step.step):
                self._validate()
            if epoch_ends or step.step % self._numbers.checkpoint_steps == 0 or self._stop.is_set():
                self._checkpoint(step, with_adapter=epoch_ends)
            if self._stop.is_set() and step.step < total:
                self._report({"event": "stopped", "step": step.step})
                return
            started = time.monotonic()
        self._finish()

    def _is_looked_at(self, step: int) -> bool:
        """Whether the validation examples are looked at behind this step: at an epoch's end, and evenly before."""
        per_epoch, looks = self._trainer.steps_per_epoch, self._spec.validations_per_epoch
        return (step * looks) // per_epoch > ((step - 1) * looks) // per_epoch

    def _tell_step(self, step: StepMetrics, seconds: float) -> None:
        self._trained_tokens += step.trained_tokens
        self._history.train(step.step, step.loss, step.accuracy)
        event = {
            "event": "step",
            "step": step.step,
            "epoch": round(step.step / self._trainer.steps_per_epoch, 3),
            "loss": step.loss,
            "accuracy": step.accuracy,
            "tokens": step.trained_tokens,
            "all_tokens": step.all_tokens,
            "learning_rate": step.learning_rate,
            "seconds": round(seconds, 3),
            "memory_bytes": self._memory.take_peak(),
        }
        self._report(event | ({"margin": step.margin} if self._spec.method == "dpo" else {}))

    def _validate(self) -> None:
        found = self._trainer.validate()
        if found is not None:
            self._history.validate(found.step, found.loss, found.accuracy)
            self._report({"event": "validation", "step": found.step, "loss": found.loss, "accuracy": found.accuracy})

    def _checkpoint(self, step: StepMetrics, *, with_adapter: bool) -> None:
        folder = self._folder
        if folder is None:
            return
        adapter = None
        if with_adapter:
            adapter = folder.adapter_path(step.step)
            self._export(adapter)
        folder.save(
            {
                "identity": self._identity,
                "plan": self._plan.as_dict(),
                "trainer": self._trainer.state(),
                "history": self._history.rows,
                "trained_tokens": self._trained_tokens,
            }
        )
        row = self._history.last()
        self._report(
            {
                "event": "checkpoint",
                "step": step.step,
                "loss": step.loss,
                "accuracy": step.accuracy,
                "valid_loss": row.get("valid_loss"),
                "valid_accuracy": row.get("valid_mean_token_accuracy"),
                "adapter": None if adapter is None else str(adapter),
            }
        )

    def _export(self, path: Path) -> None:
        try:
            export_adapter(self._trainer.lora, Path(self._spec.model), path)
        except OSError as error:
            raise StorageError(f"the adapter cannot be written: {error.strerror or error}") from None

    def _finish(self) -> None:
        output = Path(self._spec.output)
        metrics = output.with_suffix(".csv")
        self._export(output)
        try:
            self._history.write(metrics)
        except OSError as error:
            raise StorageError(f"the metrics cannot be written: {error.strerror or error}") from None
        self._report(
            {
                "event": "done",
                "adapter": str(output),
                "metrics": str(metrics),
                "trained_tokens": self._trained_tokens,
                "steps": self._trainer.total_steps,
            }
        )


def _read(spec: RunSpec, report: Report) -> _Data:
    info = describe(Path(spec.model))
    model = Model(Path(spec.model))
    try:
        vocab = model.vocab
        bos, eos = vocab.special_piece(vocab.bos), vocab.special_piece(vocab.eos)
        with contextlib.ExitStack() as stack:
            templates = [
                stack.enter_context(ChatTemplate(source, bos_token=bos, eos_token=eos))
                for source in (info.chat_template, info.named_templates.get("tool_use"))
                if source is not None
            ]
            coder = ModelCoder(vocab, *templates)
            found = load_file(Path(spec.data), spec.method, coder, spec.row_tokens)
            other = None
            if spec.validation is not None:
                other = load_file(
                    Path(spec.validation), spec.method, coder, spec.row_tokens, least=1, param="validation_file"
                )
    finally:
        model.close()
    _tell_data(found, report)
    return _Data(Examples.of(found), None if other is None else Examples.of(other))


def _tell_data(found: TrainingSet, report: Report) -> None:
    examples = Examples.of(found)
    report(
        {
            "event": "data",
            "examples": len(examples),
            "tokens": sum(len(sequence.tokens) for sequence in examples.sequences),
            "answer_tokens": sum(sequence.trained_tokens for sequence in examples.sequences),
            "cut": found.told.cut,
            "left_out": found.told.left_out,
        }
    )
    for notice in found.told.notices:
        report({"event": "notice", "line": notice.line, "message": notice.message})


_WHAT_COUNTS = (
    "method", "beta", "epochs", "batch_size", "learning_rate_multiplier", "rank", "alpha", "rank_stabilised",
    "sparsity", "row_tokens", "seed",
)  # fmt: skip


def _identity(spec: RunSpec) -> dict[str, Any]:
    """What must be the same for a run to be gone on with."""
    found: dict[str, Any] = {"model": ModelHashes().sha256(Path(spec.model))}
    for name, path in (("data", spec.data), ("validation", spec.validation)):
        found[name] = path and sha256_file(Path(path))
    return found | {name: getattr(spec, name) for name in _WHAT_COUNTS}


def _check_identity(saved: dict[str, Any], mine: dict[str, Any]) -> None:
    if saved.get("model") != mine["model"]:
        raise BaseChangedError("the base model's file is not the one that this run was begun with")
    if differing := [name for name in mine if saved.get(name) != mine[name]]:
        raise ConfigError(f"the checkpoint is of another run: {', '.join(differing)} differ")
