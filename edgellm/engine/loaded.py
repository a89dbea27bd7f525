"""A model in memory, with all that serves it."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.backend.packing import packing_kernels
from edgellm.backend.pages import huge_page_bytes, use_huge_pages
from edgellm.backend.vocab import Vocab
from edgellm.config import Settings, home_dir
from edgellm.engine.cache import PrefixCache
from edgellm.engine.draft_loading import make_speculator
from edgellm.engine.embedder import Embedder, Pooling
from edgellm.engine.fit import (
    BATCH_TOKENS,
    LoadPlan,
    context_tokens_for,
    mapped_instead,
    plan_load,
    sequences_for,
    worth_packing,
)
from edgellm.engine.plan import RunnerLimits
from edgellm.engine.runner import Runner
from edgellm.engine.threads import default_threads
from edgellm.errors import ModelLoadError, ModelUnsupportedError
from edgellm.models.describe import ModelInfo
from edgellm.models.memory import available_memory_bytes
from edgellm.moe.layout import ExpertLayout
from edgellm.moe.pager import Pager, load_paged
from edgellm.moe.skeleton import PROFILE_NAME
from edgellm.speculative.speculator import DRAFT_TOKENS

_log = logging.getLogger(__name__)

_EMBEDDING_CONTEXT_TOKENS = 2048
_EMBEDDING_BATCH_TOKENS = 128  # llama.cpp computes the logits of every embedded row too: keep them few
_HUGE_SHARE = 4  # read into memory of its own, a model may take this part of what is available
_IDLE_SHARE = 16  # finished sequences keep at most this part of the cells: see PrefixCache


@dataclass(slots=True, eq=False)
class LoadedModel:
    """Owned by the manager; `runner` and `embedder` belong to the engine thread."""

    name: str
    info: ModelInfo
    runner: Runner
    needed_bytes: int
    settings: Settings
    adapters: dict[str, Path] = field(default_factory=dict)
    embedder: Embedder | None = None
    leases: int = 0
    last_used_s: float = 0.0

    @property
    def vocab(self) -> Vocab:
        """The vocabulary; any thread may use it while a lease is held."""
        return self.runner.model.vocab

    @property
    def context_tokens(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self.runner.context.context_tokens


def load_runner(info: ModelInfo, settings: Settings, plan: LoadPlan | None = None) -> Runner:
    """Loads the weights and makes the context. Any thread may do this, before the engine knows the runner.

    `plan` is what it may take (default: that of `plan_load`). Experts that turn out not to be pageable are served in
    llama.cpp's own way where `mapped_instead` allows it. Raises ModelLoadError, ModelTooLargeError,
    ModelUnsupportedError.
    """
    plan = plan or plan_load(info, settings)
    if plan.layout is not None:
        try:
            return _load_paged(info, settings, plan.layout, plan.memory.expert_bytes or 0)
        except (ModelLoadError, ModelUnsupportedError) as error:
            plan = mapped_instead(info, settings, plan.memory.total_bytes, error)
    return _load_whole(info, settings, plan)


def _load_paged(info: ModelInfo, settings: Settings, layout: ExpertLayout, budget_bytes: int) -> Runner:
    model = load_paged(
        layout,
        budget_bytes,
        home_dir(),
        packed=settings.packed_weights == "auto",
        checksums=settings.expert_checksums == "on",
    )
    return _make_runner(model, info, settings, layout=layout)


def _load_whole(info: ModelInfo, settings: Settings, plan: LoadPlan) -> Runner:
    packed = settings.packed_weights == "auto" and worth_packing(info, plan.memory.total_bytes)
    # Packed weights lie in huge pages from the start; moving keys, values and buffers as well gains nothing there.
    may_be_huge = not packed and settings.huge_pages == "auto" and huge_page_bytes() is not None
    huge = may_be_huge and plan.memory.total_bytes * _HUGE_SHARE <= available_memory_bytes()
    model = Model(info.path, mapped=not huge and not packed, packed=packed)
    if packed:
        _log.info("%s: weights packed for %s", info.path.name, packing_kernels())
    return _make_runner(model, info, settings, huge=huge)


def _make_runner(
    model: Model, info: ModelInfo, settings: Settings, *, huge: bool = False, layout: ExpertLayout | None = None
) -> Runner:
    """All that serves `model`, which is closed if it cannot be made. `huge`: the memory taken moves to huge pages."""
    sequences = sequences_for(info, settings)
    with contextlib.ExitStack() as undo:
        undo.callback(model.close)
        context = Context(model, _context_params(info, settings, sequences))
        undo.callback(context.close)
        if huge:
            moved = use_huge_pages()
            _log.debug("%s: %d MiB in huge pages", info.path.name, moved >> 20)
        cache = PrefixCache(
            context,
            context.context_tokens,
            sequences=sequences,
            idle_cells=context.context_tokens // _IDLE_SHARE,
            saved_bytes=settings.prefix_memory_bytes,
            can_roll_back=model.can_roll_back,
            window=model.window_tokens,
        )
        speculator = make_speculator(model, context, settings, measured=layout is None)
        if speculator is not None:
            undo.callback(speculator.close)
        limits = RunnerLimits(
            parallel=settings.parallel,
            batch_tokens=BATCH_TOKENS,
            prompt_chunk_tokens=min(settings.prompt_chunk_tokens, BATCH_TOKENS),
            draft_rows=context.params.outputs - settings.parallel,
        )
        runner = Runner(model, context, limits, cache, speculator=speculator, pager=_pager(model, layout))
        undo.pop_all()
    return runner


def _context_params(info: ModelInfo, settings: Settings, sequences: int) -> ContextParams:
    return ContextParams(
        context_tokens=context_tokens_for(info, settings),
        sequences=sequences,
        batch_tokens=BATCH_TOKENS,
        outputs=max(sequences, settings.parallel + DRAFT_TOKENS),
        threads=settings.threads or default_threads(),
        flash_attention=settings.flash_attention,
    )


def _pager(model: Model, layout: ExpertLayout | None) -> Pager | None:
    if layout is None or model.experts is None:
        return None
    return Pager(model.experts, layout, model.path.with_name(PROFILE_NAME))


def load_embedder(loaded: LoadedModel) -> Embedder:
    """Makes the embedding context of a loaded model. On the engine thread.

    Raises ModelUnsupportedError for a reranker, ModelLoadError.
    """
    info, settings = loaded.info, loaded.settings
    if info.pooling == "rank":
        raise ModelUnsupportedError(f"The model '{loaded.name}' is a reranker and gives no embeddings")
    whole = min(info.context_tokens or _EMBEDDING_CONTEXT_TOKENS, _EMBEDDING_CONTEXT_TOKENS)
    batch = min(_EMBEDDING_BATCH_TOKENS, whole) if info.causal else whole
    params = ContextParams(
        context_tokens=whole,
        sequences=1,
        batch_tokens=batch,
        outputs=batch,
        threads=settings.threads or default_threads(),
        flash_attention=settings.flash_attention,
        embeddings=True,
    )
    pooling: Pooling = "cls" if info.pooling == "cls" else "last" if info.pooling == "last" else "mean"
    return Embedder(Context(loaded.runner.model, params), pooling)
