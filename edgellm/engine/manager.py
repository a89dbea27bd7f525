"""Which models are in memory: loaded on first use, kept while used, unloaded when idle, within a memory budget.

Thread-safe. Loading takes place in the caller's thread, so that the models already running keep their pace.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgellm.backend.model import Adapter
from edgellm.config import Settings
from edgellm.engine.draft_loading import drafter_memory
from edgellm.engine.embedder import Embedder
from edgellm.engine.engine import Engine
from edgellm.engine.fit import ROOM_SHARE, plan_load
from edgellm.engine.loaded import LoadedModel, load_embedder, load_runner
from edgellm.engine.types import AdapterUse
from edgellm.errors import (
    AdapterError,
    AdapterNotFoundError,
    ConfigError,
    InvalidModelFileError,
    ModelNotFoundError,
    ModelTooLargeError,
    ModelUnsupportedError,
    OverloadedError,
    ShuttingDownError,
)
from edgellm.models.describe import ModelInfo, describe
from edgellm.models.memory import available_memory_bytes
from edgellm.models.store import ModelStore, StoredModel

_log = logging.getLogger(__name__)
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An adapter that requests may name."""

    name: str
    model: str
    path: Path
    created: int  # Unix seconds
    scale: float = 1.0  # a request's own scale is multiplied with it
    owner: str | None = None  # who had it made here; None: it came from elsewhere


class ModelManager:
    """The models this process serves: those named in the settings and those in the store."""

    def __init__(
        self,
        settings: Settings,
        store: ModelStore,
        engine: Engine,
        default_model: str,
        on_unload: Callable[[str], None] = lambda _name: None,
        on_load: Callable[[LoadedModel], None] = lambda _loaded: None,
    ) -> None:
        """`default_model` is used when the settings name no model; `on_unload` hears the names of models that leave;
        `on_load` gets a model that has come before it answers anybody, on the thread that loads it.

        Raises ModelNotFoundError.
        """
        self._on_unload, self._on_load = on_unload, on_load
        self._settings = settings
        self._store = store
        self._engine = engine
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._loaded: dict[str, LoadedModel] = {}
        self._loading: dict[str, threading.Event] = {}
        self._reserved: dict[str, int] = {}  # bytes of models being loaded
        self._adapters: dict[str, AdapterRecord] = {}
        self._closing = False
        self._configured: dict[str, StoredModel] = {}
        self._aliases: dict[str, str] = {}  # what the settings call a model, in lower case, and its name
        for name in settings.model or (default_model,):
            model = store.find(name)
            if not Path(name).expanduser().exists():  # what is on this machine's disk is not for clients to name
                self._aliases[name.lower()] = model.name
            if self._configured.setdefault(model.name, model).path != model.path:
                raise ConfigError(
                    f"two models are called '{model.name}': {self._configured[model.name].path}, {model.path}"
                )
        self.default = next(iter(self._configured))
        self.budget_bytes = settings.memory_budget_bytes or int(available_memory_bytes() * ROOM_SHARE)
        self._reaper = threading.Thread(target=self._reap, name="edgellm-reaper", daemon=True)
        self._reaper.start()

    # --- names ----------------------------------------------------------------------------------------------------

    def models(self) -> list[StoredModel]:
        """Every model that can be asked for, the default first."""
        stored = {model.name: model for model in self._store.list()}
        return list((self._configured | {n: m for n, m in stored.items() if n not in self._configured}).values())

    def adapters(self) -> list[AdapterRecord]:
        """Every adapter that requests may name."""
        with self._lock:
            return list(self._adapters.values())

    def resolve(self, name: str | None) -> tuple[StoredModel, tuple[AdapterUse, ...]]:
        """The model meant by a request's `model`: a model's name, or an adapter's, which stands for its base with it.

        Never a path: clients choose among what is served. Raises ModelNotFoundError.
        """
        if not name:
            return self._configured[self.default], ()
        with self._lock:
            record = self._adapters.get(name)
        if record is not None:
            return self.resolve(record.model)[0], (AdapterUse(record.name),)
        wanted = self.full_name(name).lower()
        for model in self.models():
            if model.name.lower() == wanted:
                return model, ()
        raise ModelNotFoundError(f"The model '{name}' does not exist. GET /v1/models lists those that do.")

    def full_name(self, name: str) -> str:
        """The name that is listed for what the settings may spell in another way: `qwen/qwen2.5-0.5b-instruct-gguf`."""
        return self._aliases.get(name.lower(), name)

    # --- use ------------------------------------------------------------------------------------------------------

    @contextmanager
    def use(self, model: StoredModel) -> Iterator[LoadedModel]:
        """The model, loaded now if need be, and kept in memory until the block ends."""
        loaded = self.acquire(model)
        try:
            yield loaded
        finally:
            self.release(loaded)

    def acquire_loaded(self, name: str) -> LoadedModel | None:
        """A lease if the model is in memory already; never waits long. Pair with `release`."""
        with self._lock:
            loaded = self._loaded.get(name)
            if loaded is None:
                return None
            return self._lease(loaded)

    def acquire(self, model: StoredModel) -> LoadedModel:
        """A lease on the model; loads it first if need be, which takes a while. Pair with `release`.

        Raises ModelNotFoundError if its file is gone, InvalidModelFileError, ModelLoadError, ModelTooLargeError,
        OverloadedError when the queue is full or the memory is taken by models in use, ShuttingDownError.
        """
        while True:
            with self._lock:
                if self._closing:
                    raise ShuttingDownError("The server is shutting down")
                loaded = self._loaded.get(model.name)
                if loaded is not None:
                    return self._lease(loaded)
                waiting_for = self._loading.get(model.name)
                if waiting_for is None:
                    self._loading[model.name] = threading.Event()
                    break
            waiting_for.wait()
        try:
            loaded = self._load(model)
            with self._lock:
                self._loaded[model.name] = loaded
                return self._lease(loaded)
        finally:
            with self._lock:
                self._reserved.pop(model.name, None)
                self._loading.pop(model.name).set()

    def release(self, loaded: LoadedModel) -> None:
        """Ends a lease."""
        with self._lock:
            loaded.leases -= 1
            loaded.last_used_s = time.monotonic()
            self._changed.notify_all()

    def embedder(self, loaded: LoadedModel) -> Embedder:
        """The embedding context of a leased model, made on first use."""
        if loaded.embedder is None:

            def make() -> Embedder:
                if loaded.embedder is None:
                    loaded.embedder = load_embedder(loaded)
                return loaded.embedder

            self._engine.add(self._engine.call(make).result())
        return loaded.embedder  # type: ignore[return-value]

    def _lease(self, loaded: LoadedModel) -> LoadedModel:
        limit = self._settings.parallel + self._settings.queue_limit
        if loaded.leases >= limit:
            raise OverloadedError(f"The queue is full: {loaded.leases} requests are running or waiting")
        loaded.leases += 1
        return loaded

    # --- loading and unloading ------------------------------------------------------------------------------------

    def _load(self, model: StoredModel) -> LoadedModel:
        if not model.path.is_file():
            raise ModelNotFoundError(f"The file of the model '{model.name}' is gone: {model.path.name}")
        started = time.monotonic()
        info = describe(model.path)
        if info.is_adapter:
            raise ModelUnsupportedError(f"'{model.name}' is a LoRA adapter, not a model")
        plan = plan_load(info, self._settings, self.budget_bytes)
        drafter = drafter_memory(self._settings, model.path)
        needed = plan.memory.total_bytes + (drafter.total_bytes if drafter is not None else 0)
        self._make_room(model.name, needed)
        runner = load_runner(info, self._settings, plan)
        loaded = LoadedModel(model.name, info, runner, needed, self._settings)
        self._engine.add(runner)
        with self._lock:
            records = [record for record in self._adapters.values() if record.model == model.name]
        try:
            if (speculator := runner.speculator) is not None:
                self._engine.call(speculator.prepare).result()
            for record in records:
                self._attach_again(loaded, record, model)
            self._on_load(loaded)
        except BaseException:
            self._engine.remove(runner)
            raise
        _log.info("loaded %s in %.1f s (%d MiB planned)", model.name, time.monotonic() - started, needed // _MIB)
        return loaded

    def _make_room(self, name: str, needed: int) -> None:
        """Reserves memory, unloading idle models, least recently used first."""
        while True:
            with self._lock:
                in_use = sum(m.needed_bytes for m in self._loaded.values()) + sum(self._reserved.values())
                if needed > self.budget_bytes:
                    raise ModelTooLargeError(
                        f"The model '{name}' needs {needed // _MIB} MiB, but the memory budget is "
                        f"{self.budget_bytes // _MIB} MiB. A smaller --context-tokens, or a larger "
                        "--memory-budget, may help.",
                        needed_bytes=needed,
                        budget_bytes=self.budget_bytes,
                        in_use_bytes=in_use,
                    )
                if in_use + needed <= self.budget_bytes:
                    self._reserved[name] = needed
                    return
                idle = sorted((m for m in self._loaded.values() if not m.leases), key=lambda m: m.last_used_s)
                if not idle:
                    raise OverloadedError(
                        f"The model '{name}' needs {needed // _MIB} MiB, but models in use take {in_use // _MIB} of "
                        f"{self.budget_bytes // _MIB} MiB",
                        retry_after_s=5,
                    )
                victim = self._loaded.pop(idle[0].name)
            self._close(victim)

    def _close(self, loaded: LoadedModel) -> None:
        if loaded.embedder is not None:
            self._engine.remove(loaded.embedder)
        self._engine.remove(loaded.runner)
        self._on_unload(loaded.name)
        _log.info("unloaded %s", loaded.name)

    def _reap(self) -> None:
        """Unloads models that have been idle for `keep_alive_s`; the default model stays."""
        keep = self._settings.keep_alive_s
        while True:
            with self._lock:
                if self._closing:
                    return
                now = time.monotonic()
                idle = [m for m in self._loaded.values() if not m.leases and m.name != self.default]
                due = [m for m in idle if now - m.last_used_s >= keep]
                for model in due:
                    del self._loaded[model.name]
                if not due:
                    waits = [keep - (now - m.last_used_s) for m in idle]
                    wait = min(waits, default=float("inf"))
                    self._changed.wait(None if wait == float("inf") else max(wait, 0.01))
            for model in due:
                self._close(model)

    def loaded(self) -> list[LoadedModel]:
        """The models in memory; for metrics."""
        with self._lock:
            return list(self._loaded.values())

    def close(self) -> None:
        """No model is handed out any more. The engine closes those that are loaded."""
        with self._lock:
            self._closing = True
            self._changed.notify_all()

    # --- adapters -------------------------------------------------------------------------------------------------

    def load_adapter(
        self, name: str, path: Path, model_name: str | None = None, *, scale: float = 1.0
    ) -> AdapterRecord:
        """Makes the LoRA adapter at `path` available as `name` for a model (default: the default model).

        Raises AdapterError, InvalidModelFileError, ModelNotFoundError.
        """
        model, _ = self.resolve(model_name)
        if any(name.lower() == known.name.lower() for known in self.models()):
            raise AdapterError(f"'{name}' is the name of a model")
        if not path.is_file():
            raise AdapterError(f"There is no adapter file at {path}")
        self._check_base(describe(path), model)
        record = AdapterRecord(name, model.name, path, int(time.time()), scale)
        with self._lock:
            elsewhere = name in self._adapters and self._adapters[name].model != model.name
        if elsewhere:
            self.unload_adapter(name)
        with self.use(model) as loaded:
            self._attach(loaded, record)
            with self._lock:
                self._adapters[name] = record
        return record

    def register_adapter(self, name: str, path: Path, model: StoredModel, *, owner: str, created: int) -> AdapterRecord:
        """Makes an adapter that was made here available; `model` is not loaded for it, but has it when it is.

        Raises AdapterError, InvalidModelFileError, ModelNotFoundError if the base's file is gone.
        """
        self._check_base(describe(path), model)
        record = AdapterRecord(name, model.name, path, created, owner=owner)
        while True:
            with self._lock:
                loaded, loading = self._loaded.get(model.name), self._loading.get(model.name)
                if loaded is not None:
                    loaded.leases += 1  # it stays until the adapter is attached
                elif loading is None:
                    self._adapters[name] = record
                    return record
            if loaded is not None:
                break
            loading.wait()  # type: ignore[union-attr]  # a load has taken its list of adapters already
        try:
            self._attach(loaded, record)
            with self._lock:
                self._adapters[name] = record
        finally:
            self.release(loaded)
        return record

    def scaled(self, uses: tuple[AdapterUse, ...]) -> tuple[AdapterUse, ...]:
        """A request's adapters with the adapters' own scales worked in. Raises AdapterNotFoundError."""
        found = []
        with self._lock:
            for use in uses:
                record = self._adapters.get(use.name)
                if record is None:
                    raise AdapterNotFoundError(f"The adapter '{use.name}' is not loaded")
                found.append(AdapterUse(use.name, use.scale * record.scale))
        return tuple(found)

    def unload_adapter(self, name: str) -> None:
        """Withdraws an adapter; requests that are using it end with an error. Raises AdapterNotFoundError."""
        with self._lock:
            record = self._adapters.pop(name, None)
            loaded = self._loaded.get(record.model) if record else None
        if record is None:
            raise AdapterNotFoundError(f"The adapter '{name}' is not loaded")
        if loaded is not None:
            runner = loaded.runner
            self._engine.call(lambda: runner.remove_adapter(name)).result()

    def _attach_again(self, loaded: LoadedModel, record: AdapterRecord, model: StoredModel) -> None:
        """After the model was unloaded. An adapter whose file has gone or changed is withdrawn; the model serves on."""
        try:
            self._check_base(describe(record.path), model)
            self._attach(loaded, record)
        except (AdapterError, InvalidModelFileError, ModelNotFoundError, OSError) as error:
            _log.error("the adapter '%s' is withdrawn: %s", record.name, error)
            with self._lock:
                self._adapters.pop(record.name, None)

    def _attach(self, loaded: LoadedModel, record: AdapterRecord) -> None:
        runner = loaded.runner
        attach: Callable[[], None] = lambda: runner.add_adapter(record.name, Adapter(runner.model, record.path))  # noqa: E731
        self._engine.call(attach).result()

    @staticmethod
    def _check_base(info: ModelInfo, model: StoredModel) -> None:
        if info.adapter is None or info.adapter.kind != "lora":
            raise AdapterError(f"{info.path.name} is not a LoRA adapter")
        base = describe(model.path)
        if info.architecture != base.architecture:
            raise AdapterError(
                f"{info.path.name} was made for a model of architecture {info.architecture}, but '{model.name}' is "
                f"{base.architecture}"
            )
