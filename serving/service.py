"""What the routes share: the models, their chat templates, and the way from a request's text to token ids."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgellm.chat.template import ChatTemplate
from edgellm.config import Settings
from edgellm.engine.engine import Engine
from edgellm.engine.loaded import LoadedModel
from edgellm.engine.manager import ModelManager
from edgellm.engine.stream import EventLoopBridge
from edgellm.engine.types import AdapterUse
from edgellm.errors import (
    ContextLengthError,
    EdgeLLMError,
    OverloadedError,
    RequestError,
    RequestTimeoutError,
    ShuttingDownError,
)
from edgellm.models.bundled import DEFAULT_MODEL
from edgellm.models.store import AdapterStore, ModelStore, StoredModel
from edgellm.speculative.loading import forget, no_drafting
from serving.adaptation import Adaptation
from serving.draft_metrics import DraftSnapshot
from serving.guard_metrics import GuardMetrics
from serving.guarding import Guarding
from serving.metrics import Metrics, ModelSnapshot
from serving.quiet import Quiet
from serving.tuning import Tuning

_log = logging.getLogger(__name__)

_CLOSE_S = 30.0  # the longest that a step may reasonably take
_GUARD_CLOSE_S = 2.0  # the same of the guard's; nothing is lost with a longer one
_INLINE_BYTES = 1 << 15  # longer texts are tokenised in a thread, so that the event loop goes on
_BYTES_PER_TOKEN = 16  # texts shorter than this for each token of the context are tokenised without a second thought


class _Arrival:
    """Tells the engine that a request is being made ready, until it is submitted or given up."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        engine.arriving += 1

    def over(self) -> None:
        """Idempotent."""
        if self._engine is not None:
            self._engine.arriving -= 1
            self._engine = None


@dataclass(frozen=True, slots=True)
class Leased:
    """A model in use by a request."""

    loaded: LoadedModel
    models: ModelManager
    adapters: tuple[AdapterUse, ...]  # that the model's name stands for
    arrival: _Arrival


@dataclass(slots=True, eq=False)
class _Load:
    """A model on its way into memory, and how many requests wait for it."""

    done: asyncio.Future[LoadedModel]
    waiting: int = 0
    settled: bool = False


class Service:
    """One server's state. Created before the event loop runs; `close` ends everything."""

    def __init__(self, settings: Settings, store: ModelStore | None = None) -> None:
        """Raises ModelNotFoundError if a model of the settings is not there, ConfigError for a rule of the guard's
        that is none."""
        self.settings = settings
        self.metrics = Metrics(self._snapshot)
        self.guarding = Guarding(settings, GuardMetrics(self.metrics.registry))
        self.engine = Engine()
        self.store = store or ModelStore()
        self._bridge: EventLoopBridge | None = None
        self._templates: dict[tuple[str, str], ChatTemplate] = {}
        self._loads: dict[str, _Load] = {}
        try:
            self.models = ModelManager(
                settings,
                self.store,
                self.engine,
                DEFAULT_MODEL,
                self._unloaded,
                self._has_loaded,
            )
        except BaseException:
            self.engine.close()
            raise
        self.tuning = Tuning(self.store.home, self.models, threads=settings.threads)
        self.adaptation = Adaptation(
            settings,
            self.store.home,
            self.engine,
            self.models,
            quiet_s=lambda: self.quiet.seconds,
            training=lambda: self.tuning.training,
        )
        self.quiet = Quiet((self.tuning, self.adaptation))
        self.closing = False
        self.active_requests = 0

    def start(self) -> None:
        """Loads the default model and the adapters of the settings. Takes a while; raises what loading raises."""
        model, _ = self.models.resolve(None)
        with self.models.use(model) as loaded:
            self.template(loaded).caps()  # starts its process now rather than at the first request
        for spec in self.settings.adapter:
            name, _, path = spec.partition("=")
            if path:
                self.models.load_adapter(name, Path(path).expanduser())
            else:
                self._load_stored_adapter(name)

    def _load_stored_adapter(self, name: str) -> None:
        """For the model that it was made for, if that is known and served; else for the default model."""
        store = AdapterStore(self.store.home)
        stored = store.find(name)
        base = store.facts(stored.path).get("model")
        if base not in [model.name for model in self.models.models()]:
            base = None
        self.models.load_adapter(name, stored.path, str(base) if base else None)

    def start_tuning(self) -> None:
        """Serves what fine-tuning has made, goes on with jobs that were interrupted, and lets drafters adapt."""
        self.adaptation.start()
        try:
            self.tuning.start()
        except EdgeLLMError as error:  # answers need no jobs
            _log.error("fine-tuned models and jobs are not available: %s", error)

    def cut_off(self) -> None:
        """Ends every request that still runs with a ShuttingDownError. May be called from any thread."""
        self.closing = True
        self.guarding.close()
        self.models.close()
        for loaded in self.models.loaded():
            self.engine.post(partial(loaded.runner.fail_all, ShuttingDownError("The server is shutting down")))
            if loaded.embedder is not None:
                self.engine.post(partial(loaded.embedder.fail_all, ShuttingDownError("The server is shutting down")))

    def close(self) -> None:
        """Ends requests that still run, unloads the models, stops the thread and the template processes."""
        self.closing = True
        self.guarding.close(_GUARD_CLOSE_S)
        self.adaptation.close()
        self.tuning.close(self.settings.grace_seconds)
        self.models.close()
        if not self.engine.close(_CLOSE_S):
            _log.critical("the engine does not come back from llama.cpp; leaving without it")
            os._exit(1)
        for template in self._templates.values():
            template.close()
        self._templates.clear()

    def bridge(self) -> EventLoopBridge:
        """The engine's way into the running event loop."""
        if self._bridge is None:
            self._bridge = EventLoopBridge(self.engine)
        return self._bridge

    # --- models ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(
        self, name: str | None, timeout_s: float | None = None, arrived_s: float | None = None
    ) -> AsyncIterator[Leased]:
        """The model that a request names, loaded if need be, and kept until the block ends. The rest as `in_time`."""
        if self.closing:
            raise ShuttingDownError("The server is shutting down")
        model, own = self.models.resolve(name)
        loaded = self.models.acquire_loaded(model.name)
        if loaded is None:
            async with self.in_time(timeout_s, arrived_s):
                loaded = await self._load(model)
        leased = Leased(loaded, self.models, own, _Arrival(self.engine))
        self.active_requests += 1
        self.quiet.request_begins()
        try:
            yield leased
        finally:
            leased.arrival.over()
            self.active_requests -= 1
            self.quiet.request_ends()
            self.models.release(loaded)

    async def _load(self, model: StoredModel) -> LoadedModel:
        """A lease on a model that is not in memory: all who wait for it wait for one load, in a thread of its own."""
        load = self._loads.get(model.name)
        if load is None:
            loop = asyncio.get_running_loop()
            load = self._loads[model.name] = _Load(loop.create_future())
            threading.Thread(target=self._load_here, args=(model, load, loop), name="edgellm-load", daemon=True).start()
        if load.waiting >= self.settings.parallel + self.settings.queue_limit:
            raise OverloadedError(f"The queue is full: {load.waiting} requests wait for the model '{model.name}'")
        load.waiting += 1
        try:
            await asyncio.shield(load.done)
            loaded = self.models.acquire_loaded(model.name)  # there, for the load's own lease still holds it
            if loaded is None:
                raise ShuttingDownError("The server is shutting down")
            return loaded
        finally:
            load.waiting -= 1
            self._settle(load)

    def _load_here(self, model: StoredModel, load: _Load, loop: asyncio.AbstractEventLoop) -> None:
        loaded, error = None, None
        try:
            loaded = self.models.acquire(model)
        except BaseException as caught:
            error = caught

        def finish() -> None:
            self._loads.pop(model.name, None)
            if loaded is not None:
                load.done.set_result(loaded)
            elif error is not None:
                load.done.set_exception(error)
            self._settle(load)

        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
            loop.call_soon_threadsafe(finish)

    def _settle(self, load: _Load) -> None:
        """Once nobody waits for the load any more, its own lease ends."""
        if load.done.done() and not load.waiting and not load.settled:
            load.settled = True
            if load.done.exception() is None:
                self.models.release(load.done.result())

    @property
    def loading(self) -> bool:
        """Whether a model is being loaded, which nothing can interrupt."""
        return bool(self._loads)

    @asynccontextmanager
    async def in_time(self, timeout_s: float | None, arrived_s: float | None) -> AsyncIterator[None]:
        """Raises RequestTimeoutError when the block is not over in time: `timeout_s` seconds (None: the server's own
        limit, which is the most) after `arrived_s` (time.perf_counter; None: now)."""
        limit_s = self.limit_s(timeout_s)
        spent_s = 0.0 if arrived_s is None else time.perf_counter() - arrived_s
        try:
            async with asyncio.timeout(None if math.isinf(limit_s) else limit_s - spent_s):
                yield
        except TimeoutError:
            raise RequestTimeoutError(f"The request took longer than {limit_s:g} seconds") from None

    def limit_s(self, wanted_s: float | None) -> float:
        """How long a request may take that wishes `wanted_s` seconds."""
        return min(wanted_s or math.inf, self.settings.request_timeout_s)

    def template(self, loaded: LoadedModel, *, tools: bool = False) -> ChatTemplate:
        """The model's chat template, the one for tools where there is one and `tools` is set."""
        named = "tool_use" if tools and "tool_use" in loaded.info.named_templates else ""
        key = (loaded.name, named)
        found = self._templates.get(key)
        if found is None:
            vocab = loaded.vocab
            source = loaded.info.named_templates[named] if named else loaded.info.chat_template
            found = ChatTemplate(
                source, bos_token=vocab.special_piece(vocab.bos), eos_token=vocab.special_piece(vocab.eos)
            )
            found = self._templates.setdefault(key, found)
        return found

    def _has_loaded(self, model: LoadedModel) -> None:
        self.adaptation.loaded(model)

    def _unloaded(self, model: str) -> None:
        self.adaptation.unloaded(model)
        for key in [key for key in self._templates if key[0] == model]:
            self._templates.pop(key).close()

    def forget_drafts(self) -> None:
        """Earlier answers and what drafting has learned from them, in memory and on disk. Raises StorageError."""

        def all_of_it() -> None:
            for loaded in self.models.loaded():
                if (speculator := loaded.runner.speculator) is not None:
                    self.engine.call(speculator.forget).result()
            forget(self.store.home)

        self.adaptation.forget(all_of_it)

    # --- text to tokens -------------------------------------------------------------------------------------------

    async def tokenize(
        self, loaded: LoadedModel, text: str, *, limit: int, param: str, add_special: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a prompt of at most `limit` tokens. `<|im_start|>` and the like count as tokens.

        Raises ContextLengthError; texts that cannot fit are not tokenised at all.
        """
        size = len(text.encode())
        if size <= _INLINE_BYTES:
            tokens = loaded.vocab.tokenize(text, add_special=add_special, parse_special=True)
        else:
            tokens = await asyncio.to_thread(_tokenize_long, loaded, text, size, limit, param, add_special)
        if len(tokens) > limit:
            raise ContextLengthError(len(tokens), limit, param=param)
        return tuple(tokens)

    @staticmethod
    def check_tokens(loaded: LoadedModel, tokens: tuple[int, ...], *, limit: int, param: str) -> tuple[int, ...]:
        """The same for a prompt that came as token ids. Raises RequestError for ids the vocabulary lacks."""
        unknown = next((token for token in tokens if token >= loaded.vocab.n_tokens), None)
        if unknown is not None:
            raise RequestError(f"The model has no token {unknown}: its vocabulary has {loaded.vocab.n_tokens}", param)
        if len(tokens) > limit:
            raise ContextLengthError(len(tokens), limit, param=param)
        return tokens

    # --- metrics --------------------------------------------------------------------------------------------------

    def _snapshot(self) -> Iterator[ModelSnapshot]:
        for loaded in self.models.loaded():
            runner = loaded.runner
            ledger = runner.cache.ledger
            yield ModelSnapshot(
                model=loaded.name,
                queued_requests=runner.waiting,
                active_sequences=runner.running,
                kv_cells_used=ledger.used,
                kv_cells_total=ledger.capacity,
                prefix_lookups=runner.cache.lookups,
                prefix_hits=runner.cache.hits,
                preemptions=runner.stats.preemptions,
                step_seconds=runner.stats.step_seconds,
                decode_seconds=runner.stats.decode_seconds,
                experts=runner.pager.snapshot() if runner.pager is not None else None,
                drafts=self._drafts(loaded),
            )

    def _drafts(self, loaded: LoadedModel) -> DraftSnapshot | None:
        speculator = loaded.runner.speculator
        if speculator is not None:
            adapting = self.adaptation.running == loaded.name
            return DraftSnapshot(
                loaded.name, speculator.snapshot(), adapted=self.adaptation.figures(loaded.name), adapting=adapting
            )
        return DraftSnapshot(loaded.name, None, no_drafting(loaded.runner.model, self.settings) or "")


def _tokenize_long(loaded: LoadedModel, text: str, size: int, limit: int, param: str, add_special: bool) -> list[int]:
    if size > limit * _BYTES_PER_TOKEN:
        least = size // loaded.vocab.longest_piece_bytes
        if least > limit:
            raise ContextLengthError(least, limit, at_least=True, param=param)
    return loaded.vocab.tokenize(text, add_special=add_special, parse_special=True)
