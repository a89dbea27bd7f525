"""What a model will be given, and the memory that takes: known before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

from edgellm.backend.experts import paging_fault
from edgellm.config import Settings
from edgellm.errors import ModelUnsupportedError
from edgellm.models.describe import ModelInfo
from edgellm.models.memory import MemoryEstimate, available_memory_bytes, estimate_memory
from edgellm.moe.layout import ExpertLayout, plan_experts, read_layout

BATCH_TOKENS = 512
"""Rows of a step: what a prompt may take at once when nothing else is running."""

ROOM_SHARE = 0.8
"""Loaded models take at most this part of the memory that is available, unless the settings say otherwise."""

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


def memory_for(info: ModelInfo, settings: Settings, room_bytes: int | None = None) -> MemoryEstimate:
    """What loading the model will take.

    Experts that are paged take what the settings give them, or what is left of `room_bytes` (default: 80 % of the
    memory available now) by all the rest, but no more than all of them need. Raises ModelTooLargeError if that is less
    than the least.
    """
    estimate = estimate_memory(
        info,
        context_tokens_for(info, settings),
        sequences_for(info, settings),
        BATCH_TOKENS,
        flash_attention=settings.flash_attention != "off",
    )
    estimate = replace(estimate, prefix_bytes=settings.prefix_memory_bytes if info.causal else 0)
    if (layout := paged_layout(info, settings)) is None:
        return estimate
    estimate = replace(estimate, weights_bytes=estimate.weights_bytes - info.expert_bytes)
    if isinstance(settings.expert_memory_bytes, int):
        budget = settings.expert_memory_bytes
    else:
        room = int(available_memory_bytes() * ROOM_SHARE) if room_bytes is None else room_bytes
        budget = max(layout.least_bytes, room - estimate.total_bytes)  # if that is too much, the manager says so
    return replace(estimate, expert_bytes=plan_experts(layout, budget).total_bytes)


def paged_layout(info: ModelInfo, settings: Settings) -> ExpertLayout | None:
    """The experts that will be paged; None for a model without, or where settings or this llama.cpp rule it out.

    Raises ModelUnsupportedError if paging was asked for and cannot be.
    """
    if not info.expert_bytes or settings.expert_memory_bytes == "off":
        return None
    if fault := paging_fault():
        if settings.expert_memory_bytes != "auto":
            raise ModelUnsupportedError(f"{info.path.name}: its experts cannot be paged: {fault}")
        return None
    return read_layout(info.path, packed=settings.packed_weights == "auto")


def sequences_for(info: ModelInfo, settings: Settings) -> int:
    """Sequence ids that the model will be given: for running answers, and for finished ones that are remembered."""
    # Every sequence of a recurrent model has a state of its own, used or not; KV cells are taken as they are needed.
    return 2 * settings.parallel if info.recurrent else settings.parallel + _IDLE_SEQUENCES
