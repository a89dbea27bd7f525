"""The adapters that jobs have made: kept in the store under their ft: names, and made known to whoever serves them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgellm.errors import AdapterError, AdapterNotFoundError, EdgeLLMError, JobNotFoundError, StorageError
from edgellm.models.store import TUNED, AdapterStore
from edgellm.tune.job_types import Job, JobStatus
from edgellm.tune.jobs import JobStore

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TunedAdapter:
    """An adapter in the store that was made here. `job`: the one that made it; None if it was none."""

    name: str
    path: Path
    model: str  # the base's name
    job: str | None
    created: int  # Unix seconds


class Served(Protocol):
    """The models that are served, as far as tuning has to do with them."""

    def base(self, name: str) -> Path:
        """The file of a base model. Raises ModelNotFoundError."""

    def publish(self, adapter: TunedAdapter) -> None:
        """Requests may name the adapter from now on. Raises EdgeLLMError."""

    def withdraw(self, name: str) -> None:
        """No request may name it any more. Unknown names are ignored."""


class TunedModels:
    """The store's tuned adapters, in step with the jobs."""

    def __init__(self, store: AdapterStore, served: Served) -> None:
        self._store = store
        self._served = served

    def all(self) -> Iterator[TunedAdapter]:
        """Every one in the store, by name."""
        for stored in self._store.list():
            facts = self._store.facts(stored.path)
            model, job = facts.get("model"), facts.get("job")
            if stored.source == TUNED and isinstance(model, str):
                yield TunedAdapter(
                    stored.name, stored.path, model, job if isinstance(job, str) else None, stored.created
                )

    def find(self, name: str) -> TunedAdapter | None:
        """The one of that name."""
        return next((adapter for adapter in self.all() if adapter.name == name), None)

    def add(self, source: Path, name: str, job: Job) -> TunedAdapter:
        """Keeps a copy of `source` and serves it, in place of what had the name. Raises StorageError, EdgeLLMError."""
        try:
            stored = self._store.add(source, name, TUNED, model=job.request.model, job=job.id)
        except AdapterError as error:  # the trainer's file is sound: there is no room for it
            raise StorageError(str(error)) from None
        adapter = TunedAdapter(stored.name, stored.path, job.request.model, job.id, stored.created)
        self._served.publish(adapter)
        return adapter

    def remove(self, name: str) -> None:
        """Unknown names are ignored."""
        self._served.withdraw(name)
        with contextlib.suppress(AdapterNotFoundError):
            self._store.remove(name)

    def publish_all(self, jobs: JobStore | None) -> None:
        """Serves those whose base is served and whose job has said that they are there."""
        for adapter in self.all():
            if jobs is not None and not _announced(adapter, jobs):
                continue
            try:
                self._served.publish(adapter)
            except EdgeLLMError as error:
                _log.warning("the fine-tuned model '%s' is not served: %s", adapter.name, error)

    def sweep(self, jobs: JobStore) -> None:
        """Removes what a crash has left of jobs that did not come to say so; for who runs the jobs."""
        for adapter in self.all():
            if not _announced(adapter, jobs):
                self.remove(adapter.name)


def _announced(adapter: TunedAdapter, jobs: JobStore) -> bool:
    """Whether its job names it; true as well where there is no job to ask."""
    if adapter.job is None:
        return True
    try:
        job = jobs.get(adapter.job)
    except JobNotFoundError:
        return True
    if job.status is JobStatus.SUCCEEDED and job.progress.fine_tuned_model == adapter.name:
        return True
    return any(checkpoint.model == adapter.name for checkpoint in jobs.checkpoints(job.id, limit=1000).items)
