"""What a model will be given, and the memory that takes: known before anything is loaded, without llama.cpp."""

from __future__ import annotations

from dataclasses import replace

from edgellm.config import Settings
from edgellm.models.describe import ModelInfo
from edgellm.models.memory import MemoryEstimate, estimate_memory

BATCH_TOKENS = 512
"""Rows of a step: what a prompt may take at once when nothing else is running."""

_DEFAULT_CONTEXT_TOKENS = 8192
_IDLE_SEQUENCES = 24
_POSITION_TABLE = frozenset({"gpt2", "starcoder", "bert", "mpt"})


def context_tokens_for(info: ModelInfo, settings: Settings) -> int:
    """KV cells that the model will be given."""
    if settings.context_tokens is not None:
        # A table of positions ends where the model's own context does; llama.cpp would read past it.
        bounded = info.architecture in _POSITION_TABLE and info.context_tokens
        return min(settings.context_tokens, info.context_tokens) if bounded else settings.context_tokens
    return min(info.context_tokens or _DEFAULT_CONTEXT_TOKENS, _DEFAULT_CONTEXT_TOKENS)


def memory_for(info: ModelInfo, settings: Settings) -> MemoryEstimate:
    """What loading the model will take."""
    estimate = estimate_memory(
        info,
        context_tokens_for(info, settings),
        sequences_for(info, settings),
        BATCH_TOKENS,
        flash_attention=settings.flash_attention != "off",
    )
    return replace(estimate, prefix_bytes=settings.prefix_memory_bytes if info.causal else 0)


def sequences_for(info: ModelInfo, settings: Settings) -> int:
    """Sequence ids that the model will be given: for running answers, and for finished ones that are remembered."""
    # Every sequence of a recurrent model has a state of its own, used or not; KV cells are taken as they are needed.
    return 2 * settings.parallel if info.recurrent else settings.parallel + _IDLE_SEQUENCES
