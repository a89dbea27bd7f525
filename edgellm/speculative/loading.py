"""The speculator of a model that is being loaded, from the settings and from what was learned before."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from edgellm.backend.context import Context
from edgellm.backend.model import Model
from edgellm.backend.packing import packing_kernels
from edgellm.config import Settings
from edgellm.errors import StorageError
from edgellm.speculative.bridge import Bridge
from edgellm.speculative.calibration import measure_steps
from edgellm.speculative.costs import StepCosts
from edgellm.speculative.drafter import Drafter
from edgellm.speculative.learned import Learned, read_learned, write_learned
from edgellm.speculative.lookup import History, Lookup
from edgellm.speculative.ngram_cache import NgramCache, vocabulary_fingerprint
from edgellm.speculative.places import FOLDER, learned_path, ngrams_path
from edgellm.speculative.speculator import Speculator

_log = logging.getLogger(__name__)
_HISTORY_TOKENS = 1 << 17  # of earlier answers that are remembered; about 8 MB


def no_drafting(model: Model, settings: Settings) -> str | None:
    """Why answers of this model are not drafted; None if they are."""
    if settings.draft == "none":
        return "switched off by --draft none"
    if not model.can_roll_back:
        return "the model is recurrent or hybrid: its state cannot be taken back to before a rejected token"
    if model.has_encoder or not model.has_decoder:
        return "the model does not generate text"
    return None


def load_speculator(
    model: Model,
    context: Context,
    settings: Settings,
    home: Path,
    *,
    measured: bool = True,
    drafter: tuple[Model, Context] | None = None,
) -> Speculator:
    """The speculator of a model that `no_drafting` has nothing against.

    What is learned is kept below `home`. Its `prepare` measures step times that are not known from before, those of
    the target only if `measured` is set. `drafter` are the small model, if one is to draft, and its context; they
    belong to the speculator from now on.
    """
    path = learned_path(home, model.path)
    machine = _machine(model, context, settings)
    learned = read_learned(path, machine) or Learned({}, {})
    small = _drafter(model, *drafter, home) if drafter is not None else None
    speculator = Speculator([Lookup(History(_HISTORY_TOKENS))], StepCosts(learned.steps), small)

    def prepare() -> None:
        if measured and not speculator.costs.known:
            speculator.costs = StepCosts(measure_steps(context))
        if small is not None:
            small.costs = StepCosts(measure_steps(small.context, every_row=False))

    speculator.prepare = prepare
    for proposer in speculator.all:
        before = learned.weights.get(proposer.name, ())
        if len(before) == len(proposer.acceptance.weights):
            proposer.acceptance.weights = list(before)
    speculator.save = _saver(speculator, path, machine)
    return speculator


def _drafter(target: Model, model: Model, context: Context, home: Path) -> Drafter:
    prints = vocabulary_fingerprint(model.vocab), vocabulary_fingerprint(target.vocab)
    path = ngrams_path(home, *prints)
    cache = NgramCache.load(path, *prints)
    drafter = Drafter(model, context, Bridge(model.vocab, target.vocab, cache), StepCosts())
    drafter.cache_path = path
    return drafter


def forget(home: Path) -> int:
    """Deletes what was learned about every model below the state directory `home`. Returns how many models there were.

    Raises StorageError.
    """
    folder = home / FOLDER
    try:
        models = sum(path.is_dir() for path in folder.iterdir()) if folder.is_dir() else 0
        if folder.is_dir():
            shutil.rmtree(folder)
    except OSError as error:
        raise StorageError(f"what drafting has learned cannot be deleted: {error.strerror}") from None
    return models


def _saver(speculator: Speculator, path: Path, machine: str) -> Callable[[], None]:
    def save() -> None:
        weights = {proposer.name: tuple(proposer.acceptance.weights) for proposer in speculator.all}
        steps = speculator.costs.measured() if speculator.costs.known else {}
        try:
            if steps:
                write_learned(path, machine, Learned(steps, weights))
            if (drafter := speculator.drafter) is not None and drafter.cache_path is not None:
                drafter.bridge.cache.save(drafter.cache_path)
        except OSError as error:
            _log.warning("what drafting has learned cannot be kept: %s", error)

    return save


def _machine(model: Model, context: Context, settings: Settings) -> str:
    """Whatever changes the time of a step."""
    weights = packing_kernels() if settings.packed_weights == "auto" else "as in the file"
    size = model.path.stat().st_size
    return f"{size} bytes, weights {weights}, {context.params.threads} threads, {platform.machine()}"
