"""A fine-tuning job as it is kept: what was asked, how far it got, and the states it may go through.

                        ┌────────── pause ──────────┐
    validating_files ─> queued ─> running ─ pause ─> paused
                          ^ └ restart ┘ └─> succeeded  │
                          └────────── resume ──────────┘
From each of the four that are not the end, a job can be cancelled or fail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class JobStatus(StrEnum):
    """OpenAI's names."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether a job stays in it."""
        return not _NEXT[self]

    def may_become(self, status: JobStatus) -> bool:
        """Whether that is a transition."""
        return status in _NEXT[self]


_S = JobStatus
_NEXT: dict[JobStatus, frozenset[JobStatus]] = {
    _S.VALIDATING: frozenset({_S.QUEUED, _S.FAILED, _S.CANCELLED}),
    _S.QUEUED: frozenset({_S.RUNNING, _S.PAUSED, _S.FAILED, _S.CANCELLED}),
    _S.RUNNING: frozenset({_S.QUEUED, _S.PAUSED, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
    _S.PAUSED: frozenset({_S.QUEUED, _S.FAILED, _S.CANCELLED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What was asked; it never changes. `method` is JSON as the API has it: {"type", <type>: {"hyperparameters"}}."""

    model: str
    training_file: str
    validation_file: str | None
    seed: int
    method: dict[str, Any]
    suffix: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    model_sha256: str = ""  # of the base model's file as it was then; empty: not known


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far it got. `estimated_finish` and `finished_at` are Unix seconds."""

    trained_tokens: int | None = None
    estimated_finish: int | None = None
    finished_at: int | None = None
    fine_tuned_model: str | None = None
    result_files: tuple[str, ...] = ()
    error: JobError | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)  # what "auto" came to
    checkpoint_step: int | None = None  # from which the trainer can go on; not every one is a JobCheckpoint


@dataclass(frozen=True, slots=True)
class Job:
    """One job at one moment."""

    id: str
    created_at: int  # Unix seconds
    status: JobStatus
    request: JobRequest
    progress: JobProgress


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A line of a job's log; `type` is "message" or "metrics"."""

    id: str
    created_at: int
    level: str  # "info", "warn" or "error"
    message: str
    type: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class JobCheckpoint:
    """A step whose adapter can be used. `path` is relative to the state directory."""

    id: str
    job: str
    created_at: int
    step: int  # optimiser steps done
    model: str  # the name under which the adapter of this step can be used
    path: str
    metrics: dict[str, float]
