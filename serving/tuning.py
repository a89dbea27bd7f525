"""The server's side of fine-tuning: uploaded files, jobs and who runs them, opened when they are first asked for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm.engine.manager import ModelManager
from edgellm.engine.threads import default_threads
from edgellm.errors import (
    AdapterNotFoundError,
    ModelNotFoundError,
    ModelUnsupportedError,
    NotInstalledError,
    RequestError,
    StoredFileNotFoundError,
)
from edgellm.models.describe import describe
from edgellm.models.gguf import read_header
from edgellm.models.split import split_headers
from edgellm.models.store import AdapterStore, StoredModel
from edgellm.tune.architecture import read_architecture
from edgellm.tune.data import EXAMPLES_MIN, check_file
from edgellm.tune.database import DATABASE, Database
from edgellm.tune.examples import Method
from edgellm.tune.files import FileStore
from edgellm.tune.hashes import ModelHashes
from edgellm.tune.job_types import Job, JobRequest
from edgellm.tune.jobs import JobStore
from edgellm.tune.names import ORGANISATION
from edgellm.tune.process import torch_missing
from edgellm.tune.served import TunedAdapter, TunedModels
from edgellm.tune.supervisor import Supervisor


class _ServedModels:
    """The model manager as tuning sees it."""

    def __init__(self, models: ModelManager) -> None:
        self._models = models

    def base(self, name: str) -> Path:
        return self._base(name).path

    def publish(self, adapter: TunedAdapter) -> None:
        self._models.register_adapter(
            adapter.name, adapter.path, self._base(adapter.model), owner=ORGANISATION, created=adapter.created
        )

    def withdraw(self, name: str) -> None:
        with contextlib.suppress(AdapterNotFoundError):
            self._models.unload_adapter(name)

    def _base(self, name: str) -> StoredModel:
        model, adapters = self._models.resolve(name)
        if adapters:
            raise ModelNotFoundError(f"'{name}' is an adapter, not a model")
        return model


class Tuning:
    """A server that nobody asks for files or jobs writes nothing to the state directory. Any thread may call it."""

    def __init__(self, home: Path, models: ModelManager, *, threads: int | None = None) -> None:
        """`threads`: that a trainer computes with; None: as many as serving would."""
        self._home = home
        self._models = models
        self._served = _ServedModels(models)
        self._tuned = TunedModels(AdapterStore(home), self._served)
        self._threads = threads or default_threads()
        self._hashes = ModelHashes()
        self._lock = threading.Lock()
        self._database: Database | None = None
        self._files: FileStore | None = None
        self._supervisor: Supervisor | None = None
        self._yielding = False
        self._stop_by_s: float | None = None

    def start(self) -> None:
        """Serves what earlier jobs have made, and goes on with those that were interrupted. Raises StorageError."""
        known = (self._home / DATABASE).exists()
        self._tuned.publish_all(self.jobs() if known else None)
        if known:
            self._run_jobs()

    def files(self) -> FileStore:
        """The uploaded files. What an earlier crash has left of others is removed. Raises StorageError."""
        with self._lock:
            return self._open_files()

    def jobs(self) -> JobStore:
        """The jobs. Raises StorageError."""
        with self._lock:
            return JobStore(self._open())

    def _open(self) -> Database:
        if self._database is None:
            self._database = Database(self._home)
        return self._database

    def _open_files(self) -> FileStore:
        if self._files is None:
            files = FileStore(self._open())
            files.sweep()
            self._files = files
        return self._files

    def _run_jobs(self) -> Supervisor:
        """Who runs the jobs, running."""
        with self._lock:
            if self._supervisor is None:
                self._supervisor = Supervisor(
                    self._home,
                    JobStore(self._open()),
                    self._open_files(),
                    self._tuned,
                    self._served,
                    threads=self._threads,
                    hashes=self._hashes,
                )
                if self._yielding:
                    self._supervisor.give_way()
            supervisor = self._supervisor
        if self._stop_by_s is None:
            supervisor.start()
        return supervisor

    # --- jobs -----------------------------------------------------------------------------------------------------

    def create(
        self,
        model_name: str,
        *,
        training_file: str,
        validation_file: str | None,
        seed: int,
        method: dict[str, Any],
        suffix: str | None,
        metadata: Mapping[str, str],
    ) -> Job:
        """Checks all of it, and queues a job. Takes as long as reading the files and the model.

        Raises NotInstalledError, ModelNotFoundError, ModelUnsupportedError, RequestError, TrainingDataError with the
        lines at fault, StorageError.
        """
        check_installed()
        model = self._trainable(model_name)
        kind: Method = method["type"]
        self._check_data(training_file, kind, "training_file", EXAMPLES_MIN)
        if validation_file is not None:
            self._check_data(validation_file, kind, "validation_file", 1)
        try:
            sha256 = self._hashes.sha256(model.path)
        except OSError:
            raise ModelNotFoundError(f"The file of the model '{model.name}' cannot be read") from None
        request = JobRequest(
            model=model.name,
            training_file=training_file,
            validation_file=validation_file,
            seed=seed,
            method=method,
            suffix=suffix,
            metadata=dict(metadata),
            model_sha256=sha256,
        )
        job = self.jobs().create(request, validated=True)
        self._run_jobs().wake()
        return job

    def cancel(self, job_id: str) -> Job:
        """This and its kin raise JobNotFoundError, JobStateError, StorageError."""
        job = self.jobs().cancel(job_id)
        self._run_jobs().heed(job)
        return job

    def pause(self, job_id: str) -> Job:
        """The trainer writes a checkpoint first."""
        job = self.jobs().pause(job_id)
        self._run_jobs().heed(job)
        return job

    def resume(self, job_id: str) -> Job:
        """Also raises NotInstalledError."""
        self.jobs().get(job_id)
        check_installed()
        job = self.jobs().resume(job_id)
        self._run_jobs().wake()
        return job

    def _trainable(self, name: str) -> StoredModel:
        model, adapters = self._models.resolve(name)
        if adapters:
            raise RequestError(f"'{name}' is an adapter; fine-tune its base, the model '{model.name}'", "model")
        try:
            read_architecture(split_headers(read_header(model.path)))
            has_template = bool(describe(model.path).chat_template)
        except OSError:
            raise ModelNotFoundError(f"The file of the model '{model.name}' cannot be read") from None
        if not has_template:
            raise ModelUnsupportedError(f"The model '{model.name}' has no chat template to put examples into")
        return model

    def _check_data(self, file_id: str, method: Method, param: str, least: int) -> None:
        files = self.files()
        try:
            stored, path = files.get(file_id), files.path(file_id)
        except StoredFileNotFoundError as error:
            raise RequestError(str(error), param) from None
        if stored.purpose != "fine-tune":
            raise RequestError(f"The file '{file_id}' has the purpose {stored.purpose}, not fine-tune", param)
        check_file(path, method, least=least, param=param)

    # --- tuned models ---------------------------------------------------------------------------------------------

    def delete_model(self, name: str) -> None:
        """Removes a fine-tuned model. Raises RequestError for one that is none, ModelNotFoundError."""
        if self._tuned.find(name) is None:
            self._models.resolve(name)
            raise RequestError(f"'{name}' was not fine-tuned here, and cannot be deleted", "model")
        self._tuned.remove(name)

    # --- giving way -----------------------------------------------------------------------------------------------

    def give_way(self) -> None:
        """The trainer halts at once, also one that starts later."""
        self._yielding = True
        if self._supervisor is not None:
            self._supervisor.give_way()

    def go_on(self) -> None:
        """The machine is the trainer's again."""
        self._yielding = False
        if self._supervisor is not None:
            self._supervisor.go_on()

    @property
    def training(self) -> bool:
        """Whether a job is being trained here."""
        supervisor = self._supervisor
        return supervisor is not None and supervisor.running is not None

    # --- the end --------------------------------------------------------------------------------------------------

    def begin_stop(self, grace_s: float) -> None:
        """Ask the trainer for a checkpoint; `close` waits until `grace_s` from now. Only the first call counts."""
        if self._stop_by_s is None:
            self._stop_by_s = time.monotonic() + grace_s
            if self._supervisor is not None:
                self._supervisor.begin_stop()

    def close(self, grace_s: float = 0.0) -> None:
        """Idempotent. The trainer gets `grace_s` where `begin_stop` was not called."""
        self.begin_stop(grace_s)
        if self._supervisor is not None and self._stop_by_s is not None:
            self._supervisor.close(max(0.0, self._stop_by_s - time.monotonic()))
        with self._lock:
            if self._database is not None:
                self._database.close()
            self._database = self._files = self._supervisor = None


def check_installed() -> None:
    """Raises NotInstalledError where there is nothing to train with."""
    if torch_missing():
        raise NotInstalledError("Fine-tuning is not installed on this server: pip install 'edgellm[tune]'")
