"""A trainer's events as they go into its job: log, metrics, resolved hyperparameters, checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgellm.errors import JobStateError
from edgellm.tune.job_types import Job
from edgellm.tune.jobs import JobStore
from edgellm.tune.names import checkpoint_name, tuned_name
from edgellm.tune.served import TunedModels

CHECKPOINTS_KEPT = 3
"""Epochs whose adapters can be used; OpenAI keeps as many."""

_ESTIMATE_EVERY_S = 2.0
_NEWEST = 0.2  # a step's weight in how long steps take


class Follower:
    """Follows one job's trainers, one after the other. Its methods raise StorageError."""

    def __init__(self, job: Job, jobs: JobStore, models: TunedModels, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives Unix seconds."""
        self._job, self._jobs, self._models, self._clock = job, jobs, models, clock
        self.model = tuned_name(job.request.model, job.request.suffix, job.id)
        self.checkpoint_step = job.progress.checkpoint_step or 0
        self._steps = 0
        self._step_s = math.nan
        self._estimated_s = -math.inf
        self._dpo = job.request.method["type"] == "dpo"

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes an event. What the job's state no longer allows is left out; unknown events are."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            with contextlib.suppress(JobStateError):
                handler(event)

    def _say(self, message: str, metrics: dict[str, Any] | None = None, *, warn: bool = False) -> None:
        self._jobs.log(self._job.id, message, "warn" if warn else "info", metrics)

    def _on_data(self, event: Mapping[str, Any]) -> None:
        text = f"Training on {event['examples']} examples, {event['answer_tokens']} of their tokens to be learnt"
        self._say(text + "".join(f"; {event[key]} {say}" for key, say in _LEFT if event.get(key)))

    def _on_notice(self, event: Mapping[str, Any]) -> None:
        self._say(f"Line {event['line']}: {event['message']}" if event["line"] else str(event["message"]), warn=True)

    def _on_analysing(self, _: Mapping[str, Any]) -> None:
        self._say("Analysing which parts of the model to train")

    def _on_plan(self, event: Mapping[str, Any]) -> None:
        found = {
            "n_epochs": event["epochs"],
            "batch_size": event["batch_size"],
            "learning_rate_multiplier": event["learning_rate_multiplier"],
            "lora_rank": event["rank"],
            "sparsity": event["sparsity"],
        }
        self._jobs.progress(self._job.id, hyperparameters=found)
        low, high = event["layers"]
        self._say(
            f"Training {event['parameters']} parameters in layers {low} to {high} ({event['sparsity']}), "
            f"expected to need {event['memory_bytes'] / (1 << 20):.0f} MiB"
        )

    def _on_begun(self, event: Mapping[str, Any]) -> None:
        self._steps = event["steps"]
        if event["step"]:
            self._say(f"Going on from step {event['step']}/{event['steps']}")

    def _on_step(self, event: Mapping[str, Any]) -> None:
        step, seconds = event["step"], event["seconds"]
        metrics = self._of_step(event) | {
            "total_steps": self._steps,
            "epoch": event["epoch"],
            "learning_rate": event["learning_rate"],
            "tokens_per_second": event["all_tokens"] / seconds if seconds else None,
            "memory_bytes": event["memory_bytes"],
        }
        self._say(f"Step {step}/{self._steps}: training loss={event['loss']:.2f}", _finite(metrics))
        known = not math.isnan(self._step_s)
        self._step_s = (1 - _NEWEST) * self._step_s + _NEWEST * seconds if known else seconds
        now = self._clock()
        if abs(now - self._estimated_s) >= _ESTIMATE_EVERY_S:
            self._estimated_s = now
            finish = now + (self._steps - step) * self._step_s
            self._jobs.progress(self._job.id, estimated_finish=math.ceil(finish))

    def _on_validation(self, event: Mapping[str, Any]) -> None:
        metrics = {"step": event["step"], "total_steps": self._steps} | _validated(event["loss"], event["accuracy"])
        text = f"Step {event['step']}/{self._steps}: full validation loss={event['loss']:.2f}"
        self._say(text, _finite(metrics))

    def _on_checkpoint(self, event: Mapping[str, Any]) -> None:
        step = event["step"]
        if event.get("adapter"):
            self._keep(step, event)
        self._jobs.progress(self._job.id, checkpoint_step=step)
        self.checkpoint_step = max(self.checkpoint_step, step)

    def _keep(self, step: int, event: Mapping[str, Any]) -> None:
        job, name = self._job, checkpoint_name(self.model, step)
        metrics = self._of_step(event) | _validated(event.get("valid_loss"), event.get("valid_accuracy"))
        stored = self._models.add(event["adapter"], name, job)
        try:
            path = str(stored.path.relative_to(self._jobs.home))
            given = {key: value for key, value in _finite(metrics).items() if value is not None}
            self._jobs.add_checkpoint(job.id, step, path, name, given)
        except JobStateError:
            self._models.remove(name)
            raise
        Path(event["adapter"]).unlink(missing_ok=True)  # the store has it
        for old in self._jobs.prune_checkpoints(job.id, CHECKPOINTS_KEPT):
            self._models.remove(old.model)

    def _of_step(self, event: Mapping[str, Any]) -> dict[str, Any]:
        found = {"step": event["step"], "train_loss": event["loss"]}
        if not self._dpo:
            return found | {"train_mean_token_accuracy": event["accuracy"]}
        margin = {"train_margin": event["margin"]} if "margin" in event else {}
        return found | {"train_accuracy": event["accuracy"]} | margin


_LEFT = (("cut", "cut to the training length"), ("left_out", "left out, for they are too long"))


def _validated(loss: float | None, accuracy: float | None) -> dict[str, Any]:
    """All of the validation file is read each time, so both of OpenAI's pairs are the same."""
    return {
        "valid_loss": loss,
        "valid_mean_token_accuracy": accuracy,
        "full_valid_loss": loss,
        "full_valid_mean_token_accuracy": accuracy,
    }


def _finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """JSON has no word for NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
