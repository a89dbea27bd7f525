"""The server's side of adapting drafters: whose answers are kept, when they are learned from, what is used."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from edgellm.backend.model import Adapter
from edgellm.config import Settings
from edgellm.engine.engine import Engine
from edgellm.engine.loaded import LoadedModel
from edgellm.engine.threads import default_threads
from edgellm.errors import EdgeLLMError
from edgellm.speculative.buffer import AnswerBuffer
from edgellm.speculative.collector import Collector
from edgellm.speculative.drafter import Drafter
from edgellm.speculative.ngram_cache import vocabulary_fingerprint
from edgellm.speculative.places import adapter_path, answers_path
from edgellm.tune.adapted import Adapted, read_adapted
from edgellm.tune.adapting import Adapting, Pair
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
        loaded: Callable[[], Sequence[LoadedModel]],
        *,
        quiet_s: Callable[[], float],
        training: Callable[[], bool],
    ) -> None:
        """`quiet_s`: for how many seconds nobody has waited. `training`: whether a fine-tuning job runs."""
        self._home, self._engine, self._loaded = home, engine, loaded
        self._wanted = settings.adapt == "on"
        self._learns = False
        self._collector = Collector()
        self._adapting = Adapting(
            home,
            self._pairs,
            idle=lambda: quiet_s() >= settings.adapt_after_s,
            alone=lambda: not training(),
            threads=settings.threads or default_threads(),
        )
        self._lock = threading.Lock()
        self._known: dict[str, Pair] = {}  # by model

    # --- models ---------------------------------------------------------------------------------------------------

    def loaded(self, model: LoadedModel) -> None:
        """A model has come into memory, and answers nobody yet: it is drafted for with what was learned.

        On the loading thread. A drafter whose adapter cannot be used drafts without.
        """
        speculator = model.runner.speculator
        if speculator is None or speculator.drafter is None:
            return
        try:
            pair = self._pair(model, speculator.drafter)
            if pair.adapter.is_file():
                pair.take(pair.adapter)
        except (EdgeLLMError, OSError) as error:
            _log.error("%s is drafted for as if nothing had been learned: %s", model.name, error)
            return
        with self._lock:
            self._known[model.name] = pair
            if self._learns:
                self._listen(model, pair)

    def start(self) -> None:
        """From now on answers are kept, and learned from, unless the settings say otherwise. Idempotent."""
        if not self._wanted:
            return
        if torch_missing():
            _log.info("drafters do not adapt: pip install 'edgellm[tune]'")
            return
        models = {model.name: model for model in self._loaded()}
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
        target, small = model.info.path, drafter.model

        def take(path: Path | None) -> None:
            def swap() -> None:
                speculator = model.runner.speculator
                if speculator is not None and speculator.drafter is drafter:  # it has not failed meanwhile
                    drafter.set_adapter(None if path is None else Adapter(small, path))

            self._engine.call(swap).result()

        fingerprint = vocabulary_fingerprint(model.vocab)
        answers = AnswerBuffer(answers_path(self._home, target), fingerprint)
        return Pair(model.name, target, small.path, answers, adapter_path(self._home, target, small.path), take)

    def _pairs(self) -> list[Pair]:
        present = {model.name for model in self._loaded()}
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
            with self._collector.forgetting():
                delete()
        finally:
            self._adapting.release()

    def close(self) -> None:
        """Idempotent."""
        self._adapting.close()
        self._collector.close()
