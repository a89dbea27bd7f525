"""Loads a model whose experts are paged: the dense part into memory, the experts into a store of a given size."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from edgellm.backend.experts import ExpertStats, ExpertStore
from edgellm.backend.model import Model
from edgellm.errors import ModelLoadError
from edgellm.moe.checksums import checksums_of
from edgellm.moe.layout import ExpertLayout, plan_experts
from edgellm.moe.pair_table import TABLE_NAME, read_table, write_table
from edgellm.moe.pricing import PrefetchPrice
from edgellm.moe.profile import hottest, read_profile, write_profile
from edgellm.moe.routers import read_routers, router_width
from edgellm.moe.skeleton import skeleton_of
from edgellm.moe.widths import Widths

_log = logging.getLogger(__name__)
_MIB = 1 << 20
_SAVE_STEPS = 1000
_SAVES_OF_TABLE = 10  # the table is the larger file: it is saved once in so many times, and at the end
_CHECKSUMS = "checksums.npy"


def load_paged(
    layout: ExpertLayout,
    budget_bytes: int,
    home: Path,
    *,
    packed: bool = True,
    checksums: bool = False,
    trial_widths: Widths | None = None,
) -> Model:
    """The model with at most `budget_bytes` of its experts in memory.

    `packed`: the dense matrices are rearranged for this processor, as are the experts that the layout says so of.
    `home` is where copies of dense parts are kept (skeleton.py); `checksums`: experts are checked when they are read
    (checksums.py); `trial_widths`, (layers, experts): bits to which they are narrowed and widened again then, 0: not.
    Raises ModelTooLargeError, ModelLoadError, ModelUnsupportedError.
    """
    plan = plan_experts(layout, budget_bytes)
    path = skeleton_of(layout.headers, home)
    store = ExpertStore(
        layout.slices,
        layout.files,
        experts=layout.experts,
        pools=layout.pools,
        slots=plan.slots,
        stream_bytes=plan.stream_bytes,
        checksums=checksums_of(layout, path.with_name(_CHECKSUMS)) if checksums else None,
        trial_widths=trial_widths,
    )
    model = Model(path, mapped=False, packed=packed, experts=store)
    try:
        _set_routers(store, layout)
    except BaseException:
        model.close()
        raise
    held, all_experts = sum(plan.slots), layout.layers * layout.experts
    _log.info(
        "%s: %d of %d experts stay in memory (%d MiB)%s",
        layout.name,
        held,
        all_experts,
        plan.total_bytes // _MIB,
        "" if store.direct else "; the file system has no unbuffered reads",
    )
    return model


def _set_routers(store: ExpertStore, layout: ExpertLayout) -> None:
    """Without routers that can be used, the table of what followed what foresees less: no fault of the model's."""
    try:
        routers = read_routers(layout)
        if (width := router_width(routers)) and layout.experts_used:
            parts = [(router.weights, router.bias, router.selection_bias, router.sigmoid) for router in routers]
            store.set_routers(parts, layout.experts_used, width)
    except (OSError, ValueError) as error:
        _log.warning(
            "%s: its routers cannot be used, experts are foreseen by those that went before: %s", layout.name, error
        )


@dataclass(frozen=True, slots=True)
class PagerSnapshot:
    """A pager at one moment."""

    slots: int  # experts that memory has room for
    experts: int  # there are
    resident_bytes: int
    ahead: bool  # whether experts are read ahead
    stats: ExpertStats
    predictor: str = "none"  # what foresees experts: "routers", "table"


class Pager:
    """Attends to a paged model while it runs: what is read ahead, the profile of its routing, and the table of experts
    that follow one another, in a file beside it. On one thread."""

    def __init__(self, store: ExpertStore, layout: ExpertLayout, profile: Path) -> None:
        """Begins to fill free slots with the experts that `profile`, a file that need not be there, says are hot."""
        self.store = store
        self.price = PrefetchPrice()
        self._layout = layout
        self._profile = profile
        self._before = read_profile(profile, layout)
        self._reads = self._steps = 0
        self._warned = False
        self._table_path = profile.with_name(TABLE_NAME)
        self._saved_table = read_table(self._table_path, layout.layers, layout.experts)
        if self._saved_table is not None:
            store.restore_table(self._saved_table)
        store.read_ahead(self.price.on)
        self._fill()

    def _fill(self) -> None:
        claimed = self.store.claimed
        for layer, experts in enumerate(hottest(self._before, self._layout, self.store.slots)):
            if claimed[layer]:
                self.store.preload(layer, experts)

    def after_step(self, seconds: float, rows: int) -> None:
        """A step of `rows` rows took `seconds`."""
        reads = self.store.reads
        before = self.price.on
        self.price.observe(seconds, rows, reads - self._reads)
        self._reads = reads
        if self.price.on != before:
            self.store.read_ahead(self.price.on)
        self._steps += 1
        if self._steps % _SAVE_STEPS == 0:
            self._save_profile()
        if self._steps % (_SAVE_STEPS * _SAVES_OF_TABLE) == 0:
            self._save_table()
        if self.store.deleted and not self._warned:
            self._warned = True
            _log.warning("%s was deleted; it is served from what is still there of it", self._layout.files[0])

    def snapshot(self) -> PagerSnapshot | None:
        """What metrics show; None if the store was closed. From any thread."""
        try:
            return PagerSnapshot(
                slots=sum(self.store.slots),
                experts=self._layout.layers * self._layout.experts,
                resident_bytes=self.store.resident_bytes,
                ahead=self.price.on,
                stats=self.store.stats,
                predictor=self.store.predictor,
            )
        except ModelLoadError:
            return None

    def save(self) -> None:
        """Writes the profile and the table. A failure is logged."""
        self._save_profile()
        self._save_table()

    def _save_profile(self) -> None:
        """What was there, and what was needed since."""
        write_profile(self._profile, self._before + self.store.counts())

    def _save_table(self) -> None:
        state = self.store.table_state()
        if state is not None and state != self._saved_table:
            write_table(self._table_path, self._layout.layers, self._layout.experts, state)
            self._saved_table = state
