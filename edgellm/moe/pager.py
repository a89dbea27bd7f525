"""Loads a model whose experts are paged: the dense part into memory, the experts into a store of a given size."""

from __future__ import annotations

import logging
from pathlib import Path

from edgellm.backend.experts import ExpertStore
from edgellm.backend.model import Model
from edgellm.moe.layout import ExpertLayout, plan_experts
from edgellm.moe.skeleton import skeleton_of

_log = logging.getLogger(__name__)
_MIB = 1 << 20


def load_paged(layout: ExpertLayout, budget_bytes: int, home: Path, *, packed: bool = True) -> Model:
    """The model with at most `budget_bytes` of its experts in memory.

    `packed`: the dense matrices are rearranged for this processor, as are the experts that the layout says so of.
    `home` is where copies of dense parts are kept (skeleton.py). Raises ModelTooLargeError, ModelLoadError,
    ModelUnsupportedError.
    """
    plan = plan_experts(layout, budget_bytes)
    store = ExpertStore(
        layout.slices,
        layout.files,
        experts=layout.experts,
        pools=layout.pools,
        slots=plan.slots,
        stream_bytes=plan.stream_bytes,
    )
    try:
        path = skeleton_of(layout.files[0], home)
    except BaseException:
        store.close()
        raise
    model = Model(path, mapped=False, packed=packed, experts=store)
    held, all_experts = sum(plan.slots), layout.layers * layout.experts
    _log.info(
        "%s: %d of %d experts stay in memory (%d MiB)%s",
        layout.files[0].name,
        held,
        all_experts,
        plan.total_bytes // _MIB,
        "" if store.direct else "; the file system has no unbuffered reads",
    )
    return model
