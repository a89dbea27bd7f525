"""Requests that wait for a model on its way into memory."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.config import Settings
from edgellm.engine import manager
from edgellm.errors import ModelLoadError, OverloadedError, RequestTimeoutError
from edgellm.models.store import ModelStore
from serving.service import Service
from tests.support.tiny_gguf import write_tiny_llama

PATIENCE_S = 30


class _Gate:
    """Stands before every load, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.loads = 0
        self.error: Exception | None = None
        self._load = manager.load_runner
        monkeypatch.setattr(manager, "load_runner", self)

    def __call__(self, *arguments: object) -> object:
        self.loads += 1
        assert self.open.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        return self._load(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> _Gate:
    return _Gate(monkeypatch)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    write_tiny_llama(tmp_path / "models" / "cold.gguf")
    shutil.copy(tmp_path / "models" / "cold.gguf", tmp_path / "models" / "other.gguf")
    settings = Settings(context_tokens=256, parallel=1, queue_limit=1, threads=1, model=("other",), keep_alive_s=0)
    made = Service(settings, ModelStore(tmp_path))
    yield made
    made.close()


async def _use(service: Service, timeout_s: float | None = None) -> str:
    async with service.lease("cold", timeout_s, time.perf_counter()) as leased:
        await asyncio.sleep(0)
        return leased.loaded.name


def _free(service: Service) -> bool:
    return not service.loading and all(loaded.leases == 0 for loaded in service.models.loaded())


def test_all_wait_for_one_load_and_one_that_leaves_takes_nothing_with_it(service: Service, gate: _Gate) -> None:
    async def scene() -> list[str | BaseException]:
        requests = [asyncio.create_task(_use(service)) for _ in range(2)]
        await asyncio.sleep(0)
        requests[0].cancel()
        await asyncio.sleep(0)
        gate.open.set()
        return await asyncio.gather(*requests, return_exceptions=True)

    left, served = asyncio.run(scene())
    assert isinstance(left, asyncio.CancelledError)
    assert served == "cold"
    assert gate.loads == 1
    assert _free(service)


def test_a_failed_load_is_told_to_all_and_not_tried_again_for_each(service: Service, gate: _Gate) -> None:
    gate.error = ModelLoadError("no")
    gate.open.set()

    async def scene() -> list[str | BaseException]:
        return await asyncio.gather(_use(service), _use(service), return_exceptions=True)

    assert all(isinstance(error, ModelLoadError) for error in asyncio.run(scene()))
    assert gate.loads == 1
    assert _free(service)


def test_they_count_as_waiting_requests(service: Service, gate: _Gate) -> None:
    async def scene() -> None:
        waiting = [asyncio.create_task(_use(service)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await _use(service)
        gate.open.set()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(scene())
    assert _free(service)


def test_the_load_counts_into_a_requests_time(service: Service, gate: _Gate) -> None:
    async def scene() -> None:
        with pytest.raises(RequestTimeoutError, match=r"longer than 0\.01 seconds"):
            await _use(service, 0.01)
        gate.open.set()
        while service.loading:
            await asyncio.sleep(0.01)

    asyncio.run(scene())
    assert _free(service)
