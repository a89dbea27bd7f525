"""One fine-tuning run, from a data file to an adapter: what the process `python -m edgellm.tune` does."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgellm.backend.model import Model
from edgellm.chat.template import ChatTemplate
from edgellm.errors import AdapterError, ConfigError
from edgellm.models.describe import describe
from edgellm.tune.architecture import TARGETS, Architecture
from edgellm.tune.coding import ModelCoder
from edgellm.tune.data import TrainingSet, load_file
from edgellm.tune.decoder import Decoder
from edgellm.tune.export import export_adapter
from edgellm.tune.lora import ALPHA, RANK, Lora, LoraConfig, Site
from edgellm.tune.packing import PackedRows, pack
from edgellm.tune.trainer import PrefixCache, StepMetrics, Trainer, TrainingPlan
from edgellm.tune.weights import BaseWeights, compute_type

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What to train, on what, and how. Paths are text, so that it travels as JSON."""

    model: str
    data: str
    output: str  # the adapter
    validation: str | None = None
    epochs: int = 3
    rows_per_step: int = 4
    row_tokens: int = 512
    learning_rate: float = 5e-4
    layers: int | None = None  # the topmost so many are trained; None: a quarter, and at least two
    targets: tuple[str, ...] = TARGETS
    rank: int = RANK
    alpha: float = ALPHA
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.targets) - set(TARGETS)):
            raise ConfigError(f"no matrix is called {unknown[0]!r}; there are {', '.join(TARGETS)}")
        if self.row_tokens < 16 or (self.layers is not None and self.layers < 1):
            raise ConfigError("rows need at least 16 tokens, and at least one layer is trained")


def run(spec: RunSpec, report: Report) -> None:
    """Trains, and writes the adapter. `report` is told what happens, as dictionaries with an "event".

    Raises TrainingDataError with the lines at fault, ConfigError, ModelUnsupportedError, AdapterError if the result
    cannot be written, and what reading a model raises.
    """
    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    model = Path(spec.model)
    rows, validation = _read(spec, report)
    decoder = Decoder(BaseWeights(model, threads=spec.threads), dtype=compute_type())
    lora = Lora(decoder.shape, _sites(decoder.shape, spec), LoraConfig(spec.rank, spec.alpha), seed=spec.seed)
    plan = TrainingPlan(spec.epochs, spec.rows_per_step, spec.learning_rate, seed=spec.seed)
    with _cache(rows, decoder, lora) as cache:
        trainer = Trainer(decoder, lora, rows, plan, cache=cache)
        report(
            {
                "event": "begun",
                "steps": trainer.total_steps,
                "rows": len(rows.tokens),
                "layers": [lora.lowest_layer, decoder.shape.layers - 1],
                "parameters": sum(tensor.numel() for tensor in lora.parameters()),
            }
        )
        _validate(trainer, validation, report)
        for step in _timed(trainer.steps(), report):
            if step.step % trainer.steps_per_epoch == 0:
                _validate(trainer, validation, report)
    try:
        export_adapter(lora, model, Path(spec.output))
    except OSError as error:
        raise AdapterError(f"{spec.output} cannot be written: {error.strerror or error}") from None
    report({"event": "done", "adapter": spec.output})


def _read(spec: RunSpec, report: Report) -> tuple[PackedRows, PackedRows | None]:
    info = describe(Path(spec.model))
    model = Model(Path(spec.model))
    try:
        vocab = model.vocab
        bos, eos = vocab.special_piece(vocab.bos), vocab.special_piece(vocab.eos)
        with ChatTemplate(info.chat_template, bos_token=bos, eos_token=eos) as template:
            coder = ModelCoder(vocab, template)
            found = load_file(Path(spec.data), "supervised", coder, spec.row_tokens)
            other = None
            if spec.validation is not None:
                other = load_file(Path(spec.validation), "supervised", coder, spec.row_tokens, param="validation_file")
    finally:
        model.close()
    report({"event": "data", **_facts(found)})
    for notice in found.told.notices:
        report({"event": "notice", "line": notice.line, "message": notice.message})
    packed = pack(found.sequences, spec.row_tokens, spec.seed)
    return packed, None if other is None else pack(other.sequences, spec.row_tokens, spec.seed)


def _facts(found: TrainingSet) -> dict[str, int]:
    return {
        "examples": len(found.sequences),
        "tokens": sum(len(sequence.tokens) for sequence in found.sequences),
        "answer_tokens": sum(sequence.trained_tokens for sequence in found.sequences),
        "cut": found.told.cut,
        "left_out": found.told.left_out,
    }


def _sites(shape: Architecture, spec: RunSpec) -> list[Site]:
    """The chosen matrices of the topmost layers."""
    count = max(2, shape.layers // 4) if spec.layers is None else spec.layers
    return [Site(layer, name) for layer in range(max(0, shape.layers - count), shape.layers) for name in spec.targets]


@contextlib.contextmanager
def _cache(rows: PackedRows, decoder: Decoder, lora: Lora) -> Iterator[PrefixCache | None]:
    """A place for the frozen prefix's output, if there is a prefix."""
    if lora.lowest_layer == 0:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="edgellm-tune-") as folder:
        shape = (len(rows.tokens), rows.tokens.shape[1], decoder.shape.width)
        cache = None
        with contextlib.suppress(OSError):  # no room: each epoch computes it again
            cache = PrefixCache(Path(folder) / "prefix.bin", *shape, torch.bfloat16)
        try:
            yield cache
        finally:
            if cache is not None:
                cache.close()


def _validate(trainer: Trainer, rows: PackedRows | None, report: Report) -> None:
    if rows is not None:
        found = trainer.validate(rows)
        report({"event": "validation", "step": trainer.done, "loss": found.loss, "accuracy": found.accuracy})


def _timed(steps: Iterator[StepMetrics], report: Report) -> Iterator[StepMetrics]:
    started = time.monotonic()
    for step in steps:
        now = time.monotonic()
        report(
            {
                "event": "step",
                "step": step.step,
                "loss": step.loss,
                "accuracy": step.accuracy,
                "tokens": step.trained_tokens,
                "seconds": np.round(now - started, 3).item(),
            }
        )
        yield step
        started = time.monotonic()
