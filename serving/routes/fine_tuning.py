"""/v1/fine_tuning/jobs: create, list, show, cancel, pause and resume jobs; their events and checkpoints."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, cast

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from edgellm.errors import RequestError, ShuttingDownError
from edgellm.tune.job_types import Job, JobCheckpoint, JobEvent
from edgellm.tune.names import ORGANISATION
from serving.service import Service
from serving.wire.common import ResponseModel
from serving.wire.fine_tuning import (
    SEED_MAX,
    FineTuningCheckpoint,
    FineTuningCheckpointList,
    FineTuningError,
    FineTuningEvent,
    FineTuningEventList,
    FineTuningJob,
    FineTuningJobList,
    FineTuningJobRequest,
)

router = APIRouter(prefix="/v1/fine_tuning/jobs")
_OPENAIS_OWN = ("n_epochs", "batch_size", "learning_rate_multiplier", "beta")
_After = Annotated[str | None, Query(description="Begin after the item of this id.")]
_Limit = Annotated[int, Query(ge=1, le=1000)]


def _job(job: Job) -> FineTuningJob:
    request, progress = job.request, job.progress
    kind = request.method["type"]
    asked = request.method.get(kind, {}).get("hyperparameters", {})
    known = (
        {name: "auto" for name in _OPENAIS_OWN if name != "beta" or kind == "dpo"} | asked | progress.hyperparameters
    )
    error = progress.error
    return FineTuningJob(
        id=job.id,
        created_at=job.created_at,
        error=None if error is None else FineTuningError(code=error.code, message=error.message, param=error.param),
        fine_tuned_model=progress.fine_tuned_model,
        finished_at=progress.finished_at,
        hyperparameters={name: known[name] for name in _OPENAIS_OWN if name in known},
        model=request.model,
        organization_id=ORGANISATION,
        result_files=list(progress.result_files),
        seed=request.seed,
        status=job.status.value,
        trained_tokens=progress.trained_tokens,
        training_file=request.training_file,
        validation_file=request.validation_file,
        estimated_finish=progress.estimated_finish,
        metadata=request.metadata,
        method={"type": kind, kind: {"hyperparameters": known}},
    )


def _event(event: JobEvent) -> FineTuningEvent:
    return FineTuningEvent(
        id=event.id,
        created_at=event.created_at,
        level=cast(Any, event.level),
        message=event.message,
        type=cast(Any, event.type),
        data=event.data,
    )


def _checkpoint(checkpoint: JobCheckpoint) -> FineTuningCheckpoint:
    return FineTuningCheckpoint(
        id=checkpoint.id,
        created_at=checkpoint.created_at,
        fine_tuned_model_checkpoint=checkpoint.model,
        fine_tuning_job_id=checkpoint.job,
        metrics=checkpoint.metrics,
        step_number=checkpoint.step,
    )


def _answer(body: ResponseModel) -> Response:
    return Response(body.to_json(), media_type="application/json")


@router.post("", response_model=FineTuningJob, summary="Create a fine-tuning job")
def create_job(body: FineTuningJobRequest, http: Request) -> Response:
    """The files are checked first; 400 with every fault and its line. 501 where training is not installed."""
    service: Service = http.app.state.service
    if service.closing:
        raise ShuttingDownError("The server is shutting down")
    job = service.tuning.create(
        body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        seed=secrets.randbelow(SEED_MAX + 1) if body.seed is None else body.seed,
        method=body.method_json(),
        suffix=body.suffix,
        metadata=body.metadata or {},
    )
    return _answer(_job(job))


@router.get("", response_model=FineTuningJobList, summary="List the fine-tuning jobs")
def list_jobs(http: Request, after: _After = None, limit: _Limit = 20) -> Response:
    """The newest first; with `metadata[key]=value`, only those that have it."""
    service: Service = http.app.state.service
    page = service.tuning.jobs().list(after, limit, _wanted_metadata(http))
    return _answer(FineTuningJobList(data=[_job(job) for job in page.items], has_more=page.has_more))


def _wanted_metadata(http: Request) -> dict[str, str]:
    wanted = {}
    for name, value in http.query_params.multi_items():
        if name == "metadata" or (name.startswith("metadata[") and not name.endswith("]")):
            raise RequestError("Write metadata[key]=value", "metadata")
        if name.startswith("metadata["):
            wanted[name[len("metadata[") : -1]] = value
    return wanted


@router.get("/{job_id}", response_model=FineTuningJob, summary="One fine-tuning job")
def show_job(job_id: str, http: Request) -> Response:
    """404 `job_not_found` if there is none of that id."""
    service: Service = http.app.state.service
    return _answer(_job(service.tuning.jobs().get(job_id)))


@router.post("/{job_id}/cancel", response_model=FineTuningJob, summary="Cancel a fine-tuning job")
def cancel_job(job_id: str, http: Request) -> Response:
    """Its checkpoints stay; what it needed to go on is removed."""
    service: Service = http.app.state.service
    return _answer(_job(service.tuning.cancel(job_id)))


@router.post("/{job_id}/pause", response_model=FineTuningJob, summary="Pause a fine-tuning job")
def pause_job(job_id: str, http: Request) -> Response:
    """It keeps what it has learnt, and gives back the machine."""
    service: Service = http.app.state.service
    return _answer(_job(service.tuning.pause(job_id)))


@router.post("/{job_id}/resume", response_model=FineTuningJob, summary="Resume a paused fine-tuning job")
def resume_job(job_id: str, http: Request) -> Response:
    """It is queued again, and goes on from its last step."""
    service: Service = http.app.state.service
    return _answer(_job(service.tuning.resume(job_id)))


@router.get("/{job_id}/events", response_model=FineTuningEventList, summary="What happened in a fine-tuning job")
def list_events(job_id: str, http: Request, after: _After = None, limit: _Limit = 20) -> Response:
    """The newest first. Those of type metrics have a step's numbers in `data`."""
    service: Service = http.app.state.service
    page = service.tuning.jobs().events(job_id, after, limit)
    return _answer(FineTuningEventList(data=[_event(event) for event in page.items], has_more=page.has_more))


@router.get(
    "/{job_id}/checkpoints", response_model=FineTuningCheckpointList, summary="The checkpoints of a fine-tuning job"
)
def list_checkpoints(job_id: str, http: Request, after: _After = None, limit: _Limit = 10) -> Response:
    """The models of the last three epochs, the newest first; each can be named in requests."""
    service: Service = http.app.state.service
    page = service.tuning.jobs().checkpoints(job_id, after, limit)
    data = [_checkpoint(checkpoint) for checkpoint in page.items]
    body = FineTuningCheckpointList(data=data, has_more=page.has_more)
    if data:
        body.first_id, body.last_id = data[0].id, data[-1].id
    return _answer(body)
