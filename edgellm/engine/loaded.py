"""A model in memory, with all that serves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.backend.vocab import Vocab
from edgellm.config import Settings
from edgellm.engine.cache import PrefixCache
from edgellm.engine.embedder import Embedder, Pooling
from edgellm.engine.runner import Runner, RunnerLimits
from edgellm.engine.threads import default_threads
from edgellm.errors import ModelUnsupportedError
from edgellm.models.describe import ModelInfo
from edgellm.models.memory import MemoryEstimate, estimate_memory

BATCH_TOKENS = 512
"""Rows of a step: what a prompt may take at once when nothing else is running."""

_DEFAULT_CONTEXT_TOKENS = 8192
_EMBEDDING_CONTEXT_TOKENS = 2048
_EMBEDDING_BATCH_TOKENS = 128  # llama.cpp computes the logits of every embedded row too: keep them few
_IDLE_SEQUENCES = 24
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


def context_tokens_for(info: ModelInfo, settings: Settings) -> int:
    """KV cells that the model will be given."""
    if settings.context_tokens is not None:
        return settings.context_tokens
    return min(info.context_tokens or _DEFAULT_CONTEXT_TOKENS, _DEFAULT_CONTEXT_TOKENS)


def memory_for(info: ModelInfo, settings: Settings) -> MemoryEstimate:
    """What loading the model will take."""
    return estimate_memory(info, context_tokens_for(info, settings), _sequences(info, settings), BATCH_TOKENS)


def _sequences(info: ModelInfo, settings: Settings) -> int:
    # Every sequence of a recurrent model has a state of its own, used or not; KV cells are taken as they are needed.
    return 2 * settings.parallel if info.recurrent else settings.parallel + _IDLE_SEQUENCES


def load_runner(info: ModelInfo, settings: Settings) -> Runner:
    """Loads the weights and makes the context. Any thread may do this, before the engine knows the runner.

    Raises ModelLoadError.
    """
    model = Model(info.path)
    try:
        cells = context_tokens_for(info, settings)
        sequences = _sequences(info, settings)
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
    cache = PrefixCache(
        context,
        context.context_tokens,
        sequences=sequences,
        idle_cells=context.context_tokens // _IDLE_SHARE,
        saved_bytes=settings.prefix_memory_bytes,
        can_roll_back=model.can_roll_back,
    )
    limits = RunnerLimits(
        parallel=settings.parallel,
        batch_tokens=BATCH_TOKENS,
        prompt_chunk_tokens=min(settings.prompt_chunk_tokens, BATCH_TOKENS),
    )
    return Runner(model, context, limits, cache)


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
