"""Fine-tuning jobs with their events and checkpoints, kept in SQLite.

Every change is one transaction and checks the state it starts from, so that of two that race (a user who cancels, a
trainer that ends) one wins and the other is told. After a crash `recover` queues what was running; it goes on from its
last checkpoint. A checkpoint is announced here once its file is whole on the disk.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

from edgellm.errors import JobNotFoundError, JobStateError
from edgellm.tune.database import Database
from edgellm.tune.job_types import Job, JobCheckpoint, JobError, JobEvent, JobProgress, JobRequest, JobStatus
from edgellm.tune.pages import Page, new_id, read_page

Level = Literal["info", "warn", "error"]
_HAS_METADATA = "EXISTS (SELECT 1 FROM json_each(jobs.request, '$.metadata') WHERE key = ? AND value = ?)"
_STATE_MESSAGES = {
    JobStatus.QUEUED: "Files validated, moving job to queued state",
    JobStatus.RUNNING: "Fine-tuning job started",
    JobStatus.PAUSED: "Fine-tuning job paused",
    JobStatus.SUCCEEDED: "The job has successfully completed",
    JobStatus.CANCELLED: "The job was cancelled",
}


class JobStore:
    """The jobs of one state directory. Any thread may call it; several processes may have one each."""

    def __init__(self, database: Database, now: Callable[[], float] = time.time) -> None:
        """`now` gives Unix seconds."""
        self._database = database
        self._now = now
        self.home = database.home

    # --- jobs -----------------------------------------------------------------------------------------------------

    def create(self, request: JobRequest, *, validated: bool = False) -> Job:
        """A new job, whose files are to be validated, or were: then it is queued."""
        job = Job(new_id("ftjob-"), int(self._now()), JobStatus.VALIDATING, request, JobProgress())
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO jobs (id, created_at, status, request, progress) VALUES (?, ?, ?, ?, ?)",
                (job.id, job.created_at, job.status, _dump(asdict(request)), _dump(asdict(job.progress))),
            )
            self._log(connection, job.id, f"Created fine-tuning job: {job.id}")
            self._log(connection, job.id, f"Validating training file: {request.training_file}")
            return self._set(connection, job, JobStatus.QUEUED) if validated else job

    def get(self, job_id: str) -> Job:
        """Raises JobNotFoundError."""
        with self._database.reading() as connection:
            return _read(connection, job_id)

    def list(self, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None) -> Page[Job]:
        """The newest first, of those that have all of `metadata`. Raises RequestError if there is no job `after`."""
        having = [(_HAS_METADATA, pair) for pair in (metadata or {}).items()]
        with self._database.reading() as connection:
            return read_page(connection, "jobs", _job, where={}, after=after, limit=limit, order="desc", having=having)

    def with_status(self, *statuses: JobStatus) -> tuple[Job, ...]:
        """All jobs in one of these states, the oldest first."""
        marks = ", ".join("?" * len(statuses))
        query = f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY seq"  # noqa: S608 (marks only)
        with self._database.reading() as connection:
            return tuple(_job(row) for row in connection.execute(query, statuses).fetchall())

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended, with its events and checkpoints. Raises JobNotFoundError, JobStateError."""
        with self._database.transaction() as connection:
            job = _read(connection, job_id)
            if not job.status.is_final:
                raise JobStateError(f"The job {job_id} is {job.status}; cancel it first", "id")
            connection.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    # --- states ---------------------------------------------------------------------------------------------------

    def validated(self, job_id: str) -> Job:
        """The files are sound: the job may start. This and its kin raise JobNotFoundError, JobStateError."""
        return self._move(job_id, JobStatus.QUEUED, {JobStatus.VALIDATING})

    def claim(self) -> Job | None:
        """Start the oldest queued job, or None. No two callers get the same."""
        with self._database.transaction() as connection:
            query = "SELECT * FROM jobs WHERE status = ? ORDER BY seq LIMIT 1"
            row = connection.execute(query, (JobStatus.QUEUED,)).fetchone()
            return None if row is None else self._set(connection, _job(row), JobStatus.RUNNING)

    def pause(self, job_id: str) -> Job:
        """For a queued or running job."""
        return self._move(job_id, JobStatus.PAUSED)

    def resume(self, job_id: str) -> Job:
        """Queue a paused job again."""
        return self._move(job_id, JobStatus.QUEUED, {JobStatus.PAUSED}, message="Fine-tuning job resumed")

    def cancel(self, job_id: str) -> Job:
        """For any job that has not ended."""
        return self._move(job_id, JobStatus.CANCELLED)

    def fail(self, job_id: str, error: JobError) -> Job:
        """For any job that has not ended."""
        return self._move(job_id, JobStatus.FAILED, message=error.message, level="error", error=error)

    def succeed(self, job_id: str, fine_tuned_model: str, trained_tokens: int, result_files: tuple[str, ...]) -> Job:
        """For a running job, whose adapter is whole on the disk."""
        return self._move(
            job_id,
            JobStatus.SUCCEEDED,
            fine_tuned_model=fine_tuned_model,
            trained_tokens=trained_tokens,
            result_files=result_files,
        )

    def recover(self) -> tuple[Job, ...]:
        """Queue every job that was running when its process ended; for who has Ownership, before it runs any."""
        with self._database.transaction() as connection:
            query = "SELECT * FROM jobs WHERE status = ? ORDER BY seq"
            rows = connection.execute(query, (JobStatus.RUNNING,)).fetchall()
            return tuple(self._requeue(connection, _job(row)) for row in rows)

    def _requeue(self, connection: sqlite3.Connection, job: Job) -> Job:
        last = _last_checkpoint(connection, job.id)
        step = max(last.step if last else 0, job.progress.checkpoint_step or 0)
        start = f"step {step}" if step else "its beginning"
        return self._set(connection, job, JobStatus.QUEUED, message=f"Interrupted; going on from {start}", level="warn")

    def _move(
        self,
        job_id: str,
        status: JobStatus,
        sources: set[JobStatus] | None = None,
        *,
        message: str | None = None,
        level: Level = "info",
        **changes: Any,
    ) -> Job:
        with self._database.transaction() as connection:
            job = _read(connection, job_id)
            if not job.status.may_become(status) or (sources is not None and job.status not in sources):
                raise JobStateError(f"The job {job_id} is {job.status} and cannot become {status}", "id")
            return self._set(connection, job, status, message=message, level=level, **changes)

    def _set(
        self,
        connection: sqlite3.Connection,
        job: Job,
        status: JobStatus,
        *,
        message: str | None = None,
        level: Level = "info",
        **changes: Any,
    ) -> Job:
        if status.is_final:
            changes |= {"finished_at": int(self._now()), "estimated_finish": None}
        elif status is not JobStatus.RUNNING:
            changes["estimated_finish"] = None
        job = replace(job, status=status, progress=replace(job.progress, **changes))
        connection.execute(
            "UPDATE jobs SET status = ?, progress = ? WHERE id = ?", (status, _dump(asdict(job.progress)), job.id)
        )
        self._log(connection, job.id, message or _STATE_MESSAGES[status], level)
        return job

    # --- progress -------------------------------------------------------------------------------------------------

    def progress(
        self,
        job_id: str,
        *,
        trained_tokens: int | None = None,
        estimated_finish: int | None = None,
        hyperparameters: dict[str, Any] | None = None,
        checkpoint_step: int | None = None,
    ) -> Job:
        """Note what is given of a running job; a checkpoint also of a paused one, whose trainer writes it before it
        ends. Raises JobNotFoundError, JobStateError."""
        given = {
            "trained_tokens": trained_tokens,
            "estimated_finish": estimated_finish,
            "hyperparameters": hyperparameters,
            "checkpoint_step": checkpoint_step,
        }
        with self._database.transaction() as connection:
            job = _running(connection, job_id, or_paused=checkpoint_step is not None)
            changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
            job = replace(job, progress=replace(job.progress, **changes))
            connection.execute("UPDATE jobs SET progress = ? WHERE id = ?", (_dump(asdict(job.progress)), job_id))
        return job

    def log(self, job_id: str, message: str, level: Level = "info", metrics: dict[str, Any] | None = None) -> None:
        """Add an event, of type "metrics" if there are any. Raises JobNotFoundError."""
        with self._database.transaction() as connection:
            _read(connection, job_id)
            self._log(connection, job_id, message, level, metrics)

    def add_checkpoint(self, job_id: str, step: int, path: str, model: str, metrics: dict[str, float]) -> JobCheckpoint:
        """Announce a checkpoint, whose files at `path` (relative to the state directory) are whole.

        The job is running, or paused: its trainer writes one before it ends. A checkpoint of the same step is
        replaced: after a restart, steps since the last one are done again.
        Raises JobNotFoundError, JobStateError.
        """
        made = JobCheckpoint(new_id("ftckpt_"), job_id, int(self._now()), step, model, path, metrics)
        with self._database.transaction() as connection:
            _running(connection, job_id, or_paused=True)
            connection.execute(
                "INSERT OR REPLACE INTO checkpoints (id, job, created_at, step, model, path, metrics) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (made.id, job_id, made.created_at, step, model, path, _dump(metrics)),
            )
            self._log(connection, job_id, f"Checkpoint created at step {step}")
        return made

    def prune_checkpoints(self, job_id: str, keep: int) -> tuple[JobCheckpoint, ...]:
        """Forget all but the `keep` of the highest steps; those that are forgotten."""
        query = "SELECT * FROM checkpoints WHERE job = ? ORDER BY step DESC LIMIT -1 OFFSET ?"
        with self._database.transaction() as connection:
            old = tuple(_checkpoint(row) for row in connection.execute(query, (job_id, keep)).fetchall())
            for checkpoint in old:
                connection.execute("DELETE FROM checkpoints WHERE id = ?", (checkpoint.id,))
        return old

    def last_checkpoint(self, job_id: str) -> JobCheckpoint | None:
        """The one of the highest step."""
        with self._database.reading() as connection:
            return _last_checkpoint(connection, job_id)

    def checkpoints(self, job_id: str, after: str | None = None, limit: int = 10) -> Page[JobCheckpoint]:
        """The newest first. Raises JobNotFoundError, RequestError if there is none `after`."""
        return self._of_job("checkpoints", _checkpoint, job_id, after, limit)

    def events(self, job_id: str, after: str | None = None, limit: int = 20) -> Page[JobEvent]:
        """The newest first. Raises JobNotFoundError, RequestError if there is none `after`."""
        return self._of_job("events", _event, job_id, after, limit)

    def _of_job(
        self, table: str, make: Callable[[sqlite3.Row], Any], job_id: str, after: str | None, limit: int
    ) -> Page[Any]:
        with self._database.reading() as connection:
            _read(connection, job_id)
            return read_page(connection, table, make, where={"job": job_id}, after=after, limit=limit, order="desc")

    def _log(
        self,
        connection: sqlite3.Connection,
        job_id: str,
        message: str,
        level: Level = "info",
        metrics: dict[str, Any] | None = None,
    ) -> None:
        kind = "message" if metrics is None else "metrics"
        connection.execute(
            "INSERT INTO events (id, job, created_at, level, message, type, data) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (new_id("ftevent-"), job_id, int(self._now()), level, message, kind, _dump(metrics or {})),
        )


def _read(connection: sqlite3.Connection, job_id: str) -> Job:
    row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise JobNotFoundError(f"There is no fine-tuning job {job_id[:100]!r}")
    return _job(row)


def _running(connection: sqlite3.Connection, job_id: str, *, or_paused: bool = False) -> Job:
    job = _read(connection, job_id)
    if job.status is not JobStatus.RUNNING and not (or_paused and job.status is JobStatus.PAUSED):
        raise JobStateError(f"The job {job_id} is {job.status}, not running", "id")
    return job


def _last_checkpoint(connection: sqlite3.Connection, job_id: str) -> JobCheckpoint | None:
    query = "SELECT * FROM checkpoints WHERE job = ? ORDER BY step DESC LIMIT 1"
    row = connection.execute(query, (job_id,)).fetchone()
    return None if row is None else _checkpoint(row)


def _job(row: sqlite3.Row) -> Job:
    progress = json.loads(row["progress"])
    error = progress.pop("error")
    files = tuple(progress.pop("result_files"))
    return Job(
        row["id"],
        row["created_at"],
        JobStatus(row["status"]),
        JobRequest(**json.loads(row["request"])),
        JobProgress(**progress, result_files=files, error=None if error is None else JobError(**error)),
    )


def _event(row: sqlite3.Row) -> JobEvent:
    return JobEvent(row["id"], row["created_at"], row["level"], row["message"], row["type"], json.loads(row["data"]))


def _checkpoint(row: sqlite3.Row) -> JobCheckpoint:
    return JobCheckpoint(
        row["id"], row["job"], row["created_at"], row["step"], row["model"], row["path"], json.loads(row["metrics"])
    )


def _dump(value: object) -> str:
    """JSON. A loss may become NaN, which JSON has no word for: Python's own reader takes it back."""
    return json.dumps(value, ensure_ascii=False)
