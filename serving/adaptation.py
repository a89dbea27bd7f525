"""The server's side of adapting drafters: whose answers are kept, when they are learned from, what is used."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from edgellm.config import Settings
from edgellm.engine.draft_loading import FREE, drafter_file, load_small
from edgellm.engine.engine import Engine
from edgellm.engine.loaded import LoadedModel
from edgellm.engine.manager import ModelManager
from edgellm.engine.threads import default_threads
from edgellm.errors import ConfigError, EdgeLLMError
from edgellm.speculative.bridge import Bridge
from edgellm.speculative.buffer import AnswerBuffer
from edgellm.speculative.collector import Collector
from edgellm.speculative.drafter import Drafter
from edgellm.speculative.ngram_cache import vocabulary_fingerprint
from edgellm.speculative.places import adapter_path, answers_path, merged_path
from edgellm.tune.adapted import Adapted, read_adapted
from edgellm.tune.adapting import Adapting, Pair
from edgellm.tune.machine import MachineRest
from edgellm.tune.process import torch_missing

_ANSWER_LEAST = 8  # tokens: of a shorter answer there is nothing to learn

_log = logging.getLogger(__name__)


class Adaptation:
    """For a server whose models have no drafter it does nothing, and writes nothing."""

    def __init__(
        self,
        settings: Settings,
        home: Path,
        engine: Engine,
        models: ModelManager,
        *,
        quiet_s: Callable[[], float],
        training: Callable[[], bool],
    ) -> None:
        """`quiet_s`: for how many seconds nobody has waited. `training`: whether a fine-tuning job runs."""
        self._settings, self._home, self._engine, self._models = settings, home, engine, models
        self._wanted = settings.adapt == "on"
        self._learns = False
        self._collector = Collector()
        after_s, rest = settings.adapt_after_s, MachineRest()
        self._adapting = Adapting(
            home,
            self._pairs,
            idle=lambda: quiet_s() >= after_s and (after_s == 0 or rest.look()),
            alone=lambda: not training(),
            threads=settings.threads or default_threads(),
        )
        self._lock = threading.Lock()
        self._known: dict[str, Pair] = {}  # by model

    # --- models ---------------------------------------------------------------------------------------------------

    def loaded(self, model: LoadedModel) -> None:
        """A model has come into memory, and answers nobody yet: it is reminded of its answers that were kept. On the
        loading thread."""
        speculator = model.runner.speculator
        if speculator is None or speculator.drafter is None:
            return
        try:
            pair = self._pair(model, speculator.drafter)
            speculator.remember([record.answer for record in pair.answers.read()])
        except (EdgeLLMError, OSError) as error:
            _log.error("the drafter of %s does not adapt: %s", model.name, error)
            return
        with self._lock:
            self._known[model.name] = pair
            if self._learns:
                self._listen(model, pair)

    def start(self) -> None:
        """From now on answers are kept, and learned from, unless the settings say otherwise. Idempotent."""
        if not self._wanted or self._settings.draft in FREE:
            return
        if torch_missing():
            _log.info("drafters do not adapt: pip install 'edgellm[tune]'")
            return
        models = {model.name: model for model in self._models.loaded()}
        with self._lock:
            self._learns = True
            for name, pair in self._known.items():
                if name in models:
                    self._listen(models[name], pair)

    def _listen(self, model: LoadedModel, pair: Pair) -> None:
        def heard(prompt: Sequence[int], answer: Sequence[int]) -> None:
            if len(answer) >= _ANSWER_LEAST:
                self._collector.keep(pair.answers, prompt, answer)

        if model.runner.speculator is not None:
            model.runner.speculator.heard = heard
            self._adapting.start()

    def unloaded(self, model: str) -> None:
        """It has left memory."""
        with self._lock:
            self._known.pop(model, None)

    def _pair(self, model: LoadedModel, drafter: Drafter) -> Pair:
        target, small = model.info.path, drafter_file(self._settings)
        if small is None:
            raise ConfigError("the settings name no drafter")
        answers = AnswerBuffer(answers_path(self._home, target), vocabulary_fingerprint(model.vocab))
        adapter = adapter_path(self._home, target, small)
        return Pair(model.name, target, small, answers, adapter, lambda path: self._take(model, drafter, path))

    def _take(self, model: LoadedModel, drafter: Drafter, path: Path) -> None:
        """Drafts with the model in the file `path` from the next step on; on a thread that may take its time."""
        leased = self._models.acquire_loaded(model.name)
        if leased is None:
            return
        try:
            if leased is model:
                self._swap(model, drafter, path)
        finally:
            self._models.release(leased)

    def _swap(self, model: LoadedModel, drafter: Drafter, path: Path) -> None:
        small, context = load_small(path, self._settings)
        bridge = Bridge(small.vocab, model.vocab, drafter.bridge.cache)

        def swap() -> bool:
            speculator = model.runner.speculator
            if speculator is None or speculator.drafter is not drafter:  # it has failed, or was unloaded
                return False
            drafter.swap(small, context, bridge)
            return True

        taken = False
        try:
            taken = self._engine.call(swap).result()
        finally:
            if not taken:
                context.close()
                small.close()

    def _pairs(self) -> list[Pair]:
        present = {model.name for model in self._models.loaded()}
        with self._lock:
            return [pair for name, pair in self._known.items() if name in present]

    def figures(self, model: str) -> Adapted | None:
        """What has come of adapting the model's drafter; None if it has none. Reads a small file."""
        with self._lock:
            pair = self._known.get(model)
        return None if pair is None else read_adapted(pair.figures)

    @property
    def running(self) -> str:
        """The model whose drafter is being adapted; empty if none is."""
        return self._adapting.running

    # --- whom it gives way to -------------------------------------------------------------------------------------

    def give_way(self) -> None:
        """Halts the adaptation that runs, also one that starts later."""
        self._adapting.give_way()

    def go_on(self) -> None:
        """Nobody waits any more."""
        self._adapting.go_on()

    def forget(self, delete: Callable[[], None]) -> None:
        """Has `delete` remove what is on disk while nothing reads or writes there; what waits to be written is lost."""
        self._adapting.hold()
        try:
            adapted = [pair for pair in self._pairs() if merged_path(pair.adapter).is_file()]
            with self._collector.forgetting():
                delete()
            for pair in adapted:
                pair.take(pair.drafter)
        finally:
            self._adapting.release()

    def close(self) -> None:
        """Idempotent."""
        self._adapting.close()
        self._collector.close()
