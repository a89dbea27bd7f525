"""What a model will be given, and the memory that takes: known before anything is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from edgellm.backend.experts import paging_fault
from edgellm.backend.packing import packable_types
from edgellm.config import Settings
from edgellm.errors import ModelError, ModelUnsupportedError
from edgellm.models.describe import ModelInfo
from edgellm.models.memory import MemoryEstimate, available_memory_bytes, estimate_memory
from edgellm.moe.layout import ExpertLayout, plan_experts, read_layout

BATCH_TOKENS = 512
"""Rows of a step: what a prompt may take at once when nothing else is running."""

ROOM_SHARE = 0.8
"""Loaded models take at most this part of the memory that is available, unless the settings say otherwise."""

_log = logging.getLogger(__name__)
_DEFAULT_CONTEXT_TOKENS = 8192
_IDLE_SEQUENCES = 24
_PACKED_SHARE = 2  # a model is packed if at least one part in so many can be
_POSITION_TABLE = frozenset({"gpt2", "starcoder", "bert", "mpt"})


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How a model will be loaded."""

    memory: MemoryEstimate
    layout: ExpertLayout | None = None  # of the experts that are paged


def context_tokens_for(info: ModelInfo, settings: Settings) -> int:
    """KV cells that the model will be given."""
    if settings.context_tokens is not None:
        # A table of positions ends where the model's own context does; llama.cpp would read past it.
        bounded = info.architecture in _POSITION_TABLE and info.context_tokens
        return min(settings.context_tokens, info.context_tokens) if bounded else settings.context_tokens
    return min(info.context_tokens or _DEFAULT_CONTEXT_TOKENS, _DEFAULT_CONTEXT_TOKENS)


def plan_load(info: ModelInfo, settings: Settings, room_bytes: int | None = None) -> LoadPlan:
    """What loading the model will take.

    Experts that are paged take what the settings give them, or what is left of `room_bytes` (default: 80 % of the
    memory available now) by all the rest, but no more than all of them need. Raises ModelTooLargeError if that is less
    than the least, and what `mapped_instead` raises.
    """
    room = int(available_memory_bytes() * ROOM_SHARE) if room_bytes is None else room_bytes
    try:
        layout = paged_layout(info, settings)
    except ModelUnsupportedError as error:
        return mapped_instead(info, settings, room, error)
    whole = whole_memory(info, settings)
    if layout is None:
        return LoadPlan(whole)
    rest = replace(whole, weights_bytes=whole.weights_bytes - info.expert_bytes)
    if isinstance(settings.expert_memory_bytes, int):
        budget = settings.expert_memory_bytes
    else:
        budget = max(layout.least_bytes, room - rest.total_bytes)  # if that is too much, the manager says so
    return LoadPlan(replace(rest, expert_bytes=plan_experts(layout, budget).total_bytes), layout)


def mapped_instead(info: ModelInfo, settings: Settings, room_bytes: int, why: ModelError) -> LoadPlan:
    """The plan for a model whose experts cannot be paged: llama.cpp maps its file, as with `off`, and the log says so.

    Raises `why`, the reason, if the settings ask for paging, or for what only paging gives, if the file is an expert
    pack, which cannot be mapped, or if the whole model does not fit into `room_bytes`.
    """
    plan = LoadPlan(whole_memory(info, settings))
    asked = isinstance(settings.expert_memory_bytes, int) or settings.expert_checksums == "on"
    if asked or info.packed or plan.memory.total_bytes > room_bytes:
        raise why
    _log.warning("%s: its experts are not paged, llama.cpp maps the file (%s)", info.path.name, why)
    return plan


def whole_memory(info: ModelInfo, settings: Settings) -> MemoryEstimate:
    """What the model takes with all its experts in memory, or mapped."""
    estimate = estimate_memory(
        info,
        context_tokens_for(info, settings),
        sequences_for(info, settings),
        BATCH_TOKENS,
        flash_attention=settings.flash_attention != "off",
    )
    return replace(estimate, prefix_bytes=settings.prefix_memory_bytes if info.causal else 0)


def paged_layout(info: ModelInfo, settings: Settings) -> ExpertLayout | None:
    """The experts that will be paged; None for a model without, or where the settings say `off`.

    Raises ModelUnsupportedError if the model has experts that cannot be paged.
    """
    if not (info.expert_bytes or info.experts):
        return None
    if settings.expert_memory_bytes == "off":
        if info.packed:
            raise ModelUnsupportedError(f"{info.path.name} is an expert pack, which can only be paged")
        return None
    if fault := paging_fault():
        raise ModelUnsupportedError(f"{info.path.name}: its experts cannot be paged: {fault}")
    layout = read_layout(info.path, packed=settings.packed_weights == "auto")
    if layout is None:
        raise ModelUnsupportedError(f"{info.path.name}: its experts are not stacked tensors, and cannot be paged")
    return layout


def worth_packing(info: ModelInfo, needed_bytes: int) -> bool:
    """Most of the weights can be packed, and memory of its own for all of them is there."""
    packable = sum(info.matrix_bytes.get(kind, 0) for kind in packable_types())
    return packable * _PACKED_SHARE >= info.tensor_bytes and needed_bytes <= available_memory_bytes()


def sequences_for(info: ModelInfo, settings: Settings) -> int:
    """Sequence ids that the model will be given: for running answers, and for finished ones that are remembered."""
    # Every sequence of a recurrent model has a state of its own, used or not; KV cells are taken as they are needed.
    return 2 * settings.parallel if info.recurrent else settings.parallel + _IDLE_SEQUENCES
