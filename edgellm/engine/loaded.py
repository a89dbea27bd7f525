"""A model in memory, with all that serves it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.backend.packing import packable_types, packing_kernels
from edgellm.backend.pages import huge_page_bytes, use_huge_pages
from edgellm.backend.vocab import Vocab
from edgellm.config import Settings, home_dir
from edgellm.engine.cache import PrefixCache
from edgellm.engine.embedder import Embedder, Pooling
from edgellm.engine.fit import BATCH_TOKENS, context_tokens_for, memory_for, paged_layout, sequences_for
from edgellm.engine.runner import Runner, RunnerLimits
from edgellm.engine.threads import default_threads
from edgellm.errors import ModelUnsupportedError
from edgellm.models.describe import ModelInfo
from edgellm.models.memory import MemoryEstimate, available_memory_bytes
from edgellm.moe.layout import ExpertLayout
from edgellm.moe.pager import Pager, load_paged
from edgellm.moe.skeleton import PROFILE_NAME

_log = logging.getLogger(__name__)

_EMBEDDING_CONTEXT_TOKENS = 2048
_EMBEDDING_BATCH_TOKENS = 128  # llama.cpp computes the logits of every embedded row too: keep them few
_HUGE_SHARE = 4  # read into memory of its own, a model may take this part of what is available
_PACKED_SHARE = 2  # a model is packed if at least one part in so many can be
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


def load_runner(info: ModelInfo, settings: Settings, memory: MemoryEstimate | None = None) -> Runner:
    """Loads the weights and makes the context. Any thread may do this, before the engine knows the runner.

    `memory` is what it may take (default: `memory_for`). Raises ModelLoadError, ModelTooLargeError,
    ModelUnsupportedError.
    """
    memory = memory or memory_for(info, settings)
    layout = paged_layout(info, settings) if memory.expert_bytes is not None else None
    packed = layout is None and settings.packed_weights == "auto" and _worth_packing(info, settings)
    # Packed weights lie in huge pages from the start; moving keys, values and buffers as well gains nothing there.
    may_be_huge = not packed and layout is None and settings.huge_pages == "auto"
    huge = may_be_huge and huge_page_bytes() is not None and _fits_easily(info, settings)
    if layout is not None and memory.expert_bytes is not None:
        model = load_paged(
            layout,
            memory.expert_bytes,
            home_dir(),
            packed=settings.packed_weights == "auto",
            checksums=settings.expert_checksums == "on",
        )
    else:
        model = Model(info.path, mapped=not huge and not packed, packed=packed)
    try:
        cells = context_tokens_for(info, settings)
        sequences = sequences_for(info, settings)
        params = ContextParams(
            context_tokens=cells,
            sequences=sequences,
            batch_tokens=BATCH_TOKENS,
            outputs=max(settings.parallel, 1),
            threads=settings.threads or default_threads(),
            flash_attention=settings.flash_attention,
        )
        context = Context(model, params)
    except BaseException:
        model.close()
        raise
    if packed:
        _log.info("%s: weights packed for %s", info.path.name, packing_kernels())
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
    limits = RunnerLimits(
        parallel=settings.parallel,
        batch_tokens=BATCH_TOKENS,
        prompt_chunk_tokens=min(settings.prompt_chunk_tokens, BATCH_TOKENS),
    )
    return Runner(model, context, limits, cache, pager=_pager(model, layout))


def _pager(model: Model, layout: ExpertLayout | None) -> Pager | None:
    if layout is None or model.experts is None:
        return None
    return Pager(model.experts, layout, model.path.with_name(PROFILE_NAME))


def _worth_packing(info: ModelInfo, settings: Settings) -> bool:
    """Most of the weights can be packed, and memory of its own for all of them is there."""
    packable = sum(info.matrix_bytes.get(kind, 0) for kind in packable_types())
    if packable * _PACKED_SHARE < info.tensor_bytes:
        return False
    return memory_for(info, settings).total_bytes <= available_memory_bytes()


def _fits_easily(info: ModelInfo, settings: Settings) -> bool:
    return memory_for(info, settings).total_bytes * _HUGE_SHARE <= available_memory_bytes()


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
