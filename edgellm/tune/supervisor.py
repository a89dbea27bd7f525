"""Runs the queued jobs of a state directory, one at a time, each in a trainer's process, from a thread of its own.

What a crash at any moment leaves is made good when the jobs are next run. The order at a job's end: its adapter is
kept, then its metrics, then it is said to have succeeded; done again, each of these does nothing new.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgellm.errors import (
    EdgeLLMError,
    JobNotFoundError,
    JobStateError,
    ModelNotFoundError,
    StorageError,
    StoredFileNotFoundError,
)
from edgellm.tune.files import FileStore
from edgellm.tune.follow import Follower
from edgellm.tune.hashes import ModelHashes
from edgellm.tune.job_types import Job, JobError, JobStatus
from edgellm.tune.jobs import JobStore
from edgellm.tune.ownership import Ownership
from edgellm.tune.places import FOLDER, analysis_path
from edgellm.tune.process import TRAINER, Outcome, TrainerProcess, torch_missing
from edgellm.tune.process_slot import ProcessSlot
from edgellm.tune.served import Served, TunedModels
from edgellm.tune.spec import RunSpec

METRICS = "step_metrics.csv"
_RETRIES_MAX = 3  # of a trainer that died, without a checkpoint in between
_POLL_S = 2.0  # other processes queue and cancel jobs, too
_THRIFT = "a smaller memory_budget_bytes, or a sparser scheme such as sparsity top-2, needs less"

_log = logging.getLogger(__name__)


class _RefusedError(Exception):
    """The job cannot run. Never leaves this module."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = JobError(code, message, param)


class Supervisor:
    """At most one of all that share a state directory runs jobs; the others wait for it to end."""

    def __init__(
        self,
        home: Path,
        jobs: JobStore,
        files: FileStore,
        models: TunedModels,
        served: Served,
        *,
        threads: int = 1,
        hashes: ModelHashes | None = None,
        command: Sequence[str] = TRAINER,
    ) -> None:
        """`threads`: that a trainer computes with."""
        self._home, self._jobs, self._files, self._models, self._served = home, jobs, files, models, served
        self._threads, self._command = threads, tuple(command)
        self._hashes = hashes or ModelHashes()
        self._ownership = Ownership(home)
        self._owns = False
        self._unsaid: dict[str, JobError] = {}  # failures that the database had no room for
        self._slot = ProcessSlot()
        self._running: str | None = None
        self._lock = threading.Lock()  # of those below
        self._closing = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    # --- for the server's threads ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._work, name="edgellm-tuning", daemon=True)
                self._thread.start()

    @property
    def running(self) -> str | None:
        """The job that is being trained here."""
        return self._running

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def heed(self, job: Job) -> None:
        """The job's state was changed from outside: its trainer, if it has one, writes a checkpoint and ends, or ends
        at once if that is of no use."""
        if self._running == job.id:
            self._slot.tell(lambda process: _end(process, keep=not job.status.is_final))
        self.wake()

    def give_way(self) -> None:
        """Halts the trainer, also one that starts later, until `go_on`. Quick: it is called for every request."""
        self._slot.give_way()

    def go_on(self) -> None:
        """The machine is the trainer's again."""
        self._slot.go_on()

    def begin_stop(self) -> None:
        """Run no more jobs, and ask the trainer for a checkpoint. Its job goes on when jobs are next run."""
        with self._lock:
            self._closing = True
        self._slot.tell(_end)
        self._wake.set()

    def close(self, grace_s: float) -> None:
        """Stop, and wait for the trainer for at most `grace_s`. Idempotent."""
        self.begin_stop()
        thread = self._thread
        if thread is None:
            return
        thread.join(grace_s)
        if thread.is_alive():
            self._slot.tell(TrainerProcess.kill)
            thread.join()

    # --- the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        if torch_missing():
            _log.warning("fine-tuning jobs are not run: pip install 'edgellm[tune]'")
            return
        try:
            while not self._closing:
                if not self._turn():
                    self._wake.wait(_POLL_S)
                    self._wake.clear()
        finally:
            self._ownership.release()

    def _turn(self) -> bool:
        """Whether a job was run, so that there may be another."""
        try:
            if not self._take_over():
                return False
            self._sweep()
            job = self._jobs.claim() if self._jobs.with_status(JobStatus.QUEUED) else None
            if job is None:
                return False
            self._run(job)
            self._sweep()
            return not self._unsaid
        except (EdgeLLMError, OSError) as error:  # the disk is full, say: the server serves on, and this is tried again
            _log.error("fine-tuning jobs cannot be run now: %s", error)
        except Exception:
            _log.exception("unexpected error while running a fine-tuning job")
        self._owns = False  # whatever runs in the database has no trainer: recover it
        return False

    def _take_over(self) -> bool:
        if not self._ownership.acquire():
            return False
        for job_id, error in list(self._unsaid.items()):
            self._say_failed(job_id, error)
            del self._unsaid[job_id]
        if not self._owns:
            for job in self._jobs.recover():
                _log.info("the fine-tuning job %s was interrupted and is queued again", job.id)
            self._models.sweep(self._jobs)
            self._owns = True
        return True

    def _sweep(self) -> None:
        """Removes what jobs that have ended needed: it holds user data."""
        for folder in (self._home / FOLDER).glob("ftjob-*"):
            try:
                over = self._jobs.get(folder.name).status.is_final
            except JobNotFoundError:
                over = True
            if over:
                shutil.rmtree(folder, ignore_errors=True)

    # --- one job --------------------------------------------------------------------------------------------------

    def _run(self, job: Job) -> None:
        error: JobError | None = None
        try:
            self._attempt(job, Follower(job, self._jobs, self._models))
        except _RefusedError as refused:
            error = refused.error
        except StorageError as failed:
            error = JobError("storage_failed", str(failed))
        except EdgeLLMError as failed:
            error = JobError("server_error", str(failed))
        except OSError as failed:
            error = JobError("storage_failed", failed.strerror or str(failed))
        if error is not None:
            self._fail(job.id, error)

    def _fail(self, job_id: str, error: JobError) -> None:
        _log.warning("the fine-tuning job %s failed: %s", job_id, error.message)
        shutil.rmtree(self._state(job_id), ignore_errors=True)  # first: it makes room for the sentence
        try:
            self._say_failed(job_id, error)
        except StorageError:
            self._unsaid[job_id] = error
            raise

    def _say_failed(self, job_id: str, error: JobError) -> None:
        try:
            self._jobs.fail(job_id, error)
        except (JobStateError, JobNotFoundError):  # it was cancelled meanwhile
            _log.info("the fine-tuning job %s had ended already", job_id)

    def _attempt(self, job: Job, follower: Follower) -> None:
        """Trains until the job has ended, or need not go on here. Raises _RefusedError, StorageError and others."""
        retries = 0
        while True:
            reached = follower.checkpoint_step
            outcome = self._train(job, self._spec(job), follower)
            if self._closing or self._jobs.get(job.id).status is not JobStatus.RUNNING:
                return
            if outcome.kind == "done":
                self._finish(job, outcome, follower.model)
                return
            if outcome.kind == "failed":
                raise _RefusedError(outcome.code, outcome.message, outcome.param)
            if outcome.out_of_memory:
                raise _RefusedError("out_of_memory", f"{outcome.message}; {_THRIFT}")
            message = outcome.message or "the trainer ended before its time"
            retries = 1 if follower.checkpoint_step > reached else retries + 1
            if retries > _RETRIES_MAX:
                raise _RefusedError("server_error", message)
            start = f"step {follower.checkpoint_step}" if follower.checkpoint_step else "its beginning"
            self._jobs.log(job.id, f"Interrupted, for {message}; going on from {start}", "warn")

    def _train(self, job: Job, spec: RunSpec, follower: Follower) -> Outcome:
        def take(event: dict[str, Any]) -> None:
            follower(event)
            if event["event"] == "step":  # another process may have changed its state
                status = self._jobs.get(job.id).status
                if status is not JobStatus.RUNNING:
                    _end(process, keep=not status.is_final)

        self._running = job.id
        try:
            with TrainerProcess(spec, take, command=self._command) as process, self._slot.occupied(process):
                status = self._jobs.get(job.id).status
                if self._closing or status is not JobStatus.RUNNING:  # nobody could tell it until now
                    process.kill()
                return process.wait()
        finally:
            self._running = None

    def _finish(self, job: Job, outcome: Outcome, name: str) -> None:
        done = outcome.event
        self._models.add(Path(done["adapter"]), name, job)
        result = self._files.add(Path(done["metrics"]).read_bytes(), METRICS, "fine-tune-results", _result_id(job.id))
        try:
            self._jobs.succeed(job.id, name, int(done["trained_tokens"]), (result.id,))
        except JobStateError as error:  # cancelled, or paused, at the last moment
            _log.info("%s", error)
            self._models.remove(name)
            self._files.delete(result.id)

    def _state(self, job_id: str) -> Path:
        return self._home / FOLDER / job_id

    def _spec(self, job: Job) -> RunSpec:
        """Raises _RefusedError if what the job needs has gone or changed; StorageError."""
        request = job.request
        try:
            model = self._served.base(request.model)
            sha256 = self._hashes.sha256(model)
        except ModelNotFoundError as error:
            raise _RefusedError("model_not_found", str(error), "model") from None
        except OSError as error:
            raise _RefusedError(
                "model_not_found", f"the base model cannot be read: {error.strerror}", "model"
            ) from None
        if request.model_sha256 and sha256 != request.model_sha256:
            text = f"the file of the model '{request.model}' is not the one that the job was created for"
            raise _RefusedError("model_changed", text, "model")
        state = self._state(job.id)
        try:
            for folder in (state.parent, state):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{state} cannot be made: {error.strerror or error}") from None
        kind = request.method["type"]
        asked = {
            name: value
            for name, value in request.method.get(kind, {}).get("hyperparameters", {}).items()
            if value != "auto"
        }
        return RunSpec(
            model=str(model),
            data=str(self._file(request.training_file, "training_file")),
            output=str(state / "adapter.gguf"),
            state=str(state),
            validation=request.validation_file and str(self._file(request.validation_file, "validation_file")),
            method=kind,
            beta=asked.get("beta"),
            epochs=asked.get("n_epochs"),
            batch_size=asked.get("batch_size"),
            learning_rate_multiplier=asked.get("learning_rate_multiplier"),
            rank=asked.get("lora_rank"),
            sparsity=asked.get("sparsity", "auto"),
            memory_budget_bytes=asked.get("memory_budget_bytes"),
            time_budget_s=asked.get("time_budget_s"),
            seed=request.seed,
            threads=self._threads,
            analysis=str(analysis_path(self._home, sha256)),
        )

    def _file(self, file_id: str, param: str) -> Path:
        try:
            return self._files.path(file_id)
        except StoredFileNotFoundError as error:
            raise _RefusedError("file_not_found", str(error), param) from None


def _end(process: TrainerProcess, *, keep: bool = True) -> None:
    """With a checkpoint, if there is something to `keep`."""
    if keep and process.has_begun:
        process.stop()
    else:
        process.kill()


def _result_id(job_id: str) -> str:
    """The id of a job's result file: always the same, so that it is written once however often that is tried."""
    return "file-" + hashlib.sha256(job_id.encode()).hexdigest()[:24]
