"""What drafts for a model that is being loaded, the small model included if the settings name one."""

from __future__ import annotations

import logging
from pathlib import Path

from edgellm.backend.context import Context
from edgellm.backend.model import Model
from edgellm.config import Settings, home_dir
from edgellm.engine.fit import worth_packing
from edgellm.engine.threads import default_threads
from edgellm.errors import ConfigError, InvalidModelFileError, ModelLoadError
from edgellm.models.describe import ModelInfo, describe
from edgellm.models.memory import MemoryEstimate, estimate_memory
from edgellm.models.store import ModelStore
from edgellm.speculative.drafter import BATCH_TOKENS, CELLS, SEQUENCES, drafter_context
from edgellm.speculative.loading import load_speculator, no_drafting
from edgellm.speculative.places import adapter_path, merged_path
from edgellm.speculative.speculator import Speculator

_log = logging.getLogger(__name__)
FREE = frozenset({"auto", "ngram", "none"})
"""Values of the setting that name no drafter."""


def drafter_file(settings: Settings) -> Path | None:
    """The small model's file; None if the settings name none. Raises ModelNotFoundError."""
    return None if settings.draft in FREE else ModelStore().find(settings.draft).path


def drafter_memory(settings: Settings, target: Path) -> MemoryEstimate | None:
    """What the small model takes that drafts for the model in the file `target`. Raises ModelNotFoundError."""
    path = drafter_file(settings)
    return None if path is None else _estimate(describe(adapted_file(target, path)), settings)


def adapted_file(target: Path, drafter: Path) -> Path:
    """The file with what `drafter` has learned of `target`; `drafter` itself if it has learned nothing."""
    try:
        merged = merged_path(adapter_path(home_dir(), target, drafter))
        if not merged.is_file():
            return drafter
        describe(merged)
    except (OSError, InvalidModelFileError) as error:
        _log.error("%s drafts for %s as if it had learned nothing: %s", drafter.name, target.name, error)
        return drafter
    return merged


def _estimate(info: ModelInfo, settings: Settings) -> MemoryEstimate:
    flash = settings.flash_attention != "off"
    return estimate_memory(info, SEQUENCES * CELLS, SEQUENCES, BATCH_TOKENS, flash_attention=flash)


def load_small(path: Path, settings: Settings) -> tuple[Model, Context]:
    """A model that drafts, and its context. Raises ModelLoadError, InvalidModelFileError, ConfigError for one that
    cannot draft."""
    info = describe(path)
    packed = settings.packed_weights == "auto" and worth_packing(info, _estimate(info, settings).total_bytes)
    small = Model(path, mapped=not packed, packed=packed)
    try:
        if not small.can_roll_back or not small.has_decoder or small.has_encoder:
            raise ConfigError(f"--draft {settings.draft}: the model cannot draft, for it is recurrent or no decoder")
        threads = settings.threads or default_threads()
        return small, drafter_context(small, threads=threads, flash_attention=settings.flash_attention)
    except BaseException:
        small.close()
        raise


def make_speculator(model: Model, context: Context, settings: Settings, *, measured: bool) -> Speculator | None:
    """The speculator of a model; None if its answers are not drafted. `measured`: whether step times may be.

    Raises ModelNotFoundError, ModelLoadError and ConfigError for the small model, BackendError.
    """
    if (reason := no_drafting(model, settings)) is not None:
        if settings.draft != "none":
            _log.info("%s: answers are not drafted: %s", model.path.name, reason)
        return None
    path = drafter_file(settings)
    if path is None:
        return load_speculator(model, context, settings, home_dir(), measured=measured)
    small = _load_adapted(model.path, path, settings)
    try:
        speculator = load_speculator(model, context, settings, home_dir(), measured=measured, drafter=small)
    except BaseException:
        for one in reversed(small):
            one.close()
        raise
    _log.info("%s drafts for %s", small[0].path.name, model.path.name)
    return speculator


def _load_adapted(target: Path, drafter: Path, settings: Settings) -> tuple[Model, Context]:
    """With what was learned, as far as that can be used."""
    adapted = adapted_file(target, drafter)
    if adapted != drafter:
        try:
            return load_small(adapted, settings)
        except (ModelLoadError, InvalidModelFileError, ConfigError, OSError) as error:
            _log.error("%s drafts for %s as if it had learned nothing: %s", drafter.name, target.name, error)
    return load_small(drafter, settings)
