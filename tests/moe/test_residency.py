"""The pager's policy: rules that hold whatever happens, what it evicts, and that both copies decide the same."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm import _kernels
from edgellm.moe.residency import Load, Residency

COPIES = [Residency, _kernels.Residency]


def plain(loads: Any) -> list[Load]:
    return [Load(load.expert, load.slot, load.evicted_layer, load.evicted_expert) for load in loads]


class Checked:
    """Both copies side by side, and a third account of who lies where that checks every rule."""

    def __init__(self, layers: int, experts: int, pools: list[int], slots: list[int]) -> None:
        self.layers, self.experts, self.pools, self.slots = layers, experts, pools, slots
        self.copies = [copy(layers, experts, pools=pools, slots=slots) for copy in COPIES]
        self.holds: dict[tuple[int, int], tuple[int, int]] = {}  # (pool, slot): (layer, expert)
        self.busy: set[tuple[int, int]] = set()
        self.pinned: set[tuple[int, int]] = set()

    def both(self, method: str, *arguments: Any) -> Any:
        python, native = (getattr(copy, method)(*arguments) for copy in self.copies)
        if method in ("visit", "prefetch", "preload"):
            python, native = plain(python), plain(native)
        assert python == native
        return python

    def visit(self, layer: int, experts: list[int]) -> None:
        self.pinned = {(layer, expert) for expert in experts}
        wanted = [expert for expert in experts if (layer, expert) not in self.holds.values()]
        evictable = self._evictable(layer)
        loads = self.both("visit", layer, experts)
        self._apply(layer, loads)
        assert [load.expert for load in loads] == wanted[: len(loads)]
        assert len(loads) == min(len(wanted), evictable)

    def prefetch(self, layer: int, experts: list[int], limit: int) -> None:
        loads = self.both("prefetch", layer, experts, limit)
        assert len(loads) <= limit
        assert {load.expert for load in loads} <= set(experts)
        self._apply(layer, loads)

    def preload(self, layer: int, experts: list[int]) -> None:
        loads = self.both("preload", layer, experts)
        assert all(load.evicted_layer == load.evicted_expert == -1 for load in loads)
        self._apply(layer, loads)

    def set_busy(self, pool: int, slot: int, busy: bool) -> None:
        self.both("set_busy", pool, slot, busy)
        (self.busy.add if busy else self.busy.discard)((pool, slot))

    def forget(self, layer: int, expert: int) -> None:
        self.both("forget", layer, expert)
        for place in [place for place, held in self.holds.items() if held == (layer, expert)]:
            del self.holds[place]
            self.busy.discard(place)

    def agree(self) -> None:
        """What the copies say of every expert is what was loaded and not evicted since."""
        for layer in range(self.layers):
            held = {expert: slot for (_, slot), (of, expert) in self.holds.items() if of == layer}
            assert self.both("resident", layer) == sorted(held)
            for expert in range(self.experts):
                assert self.both("slot_of", layer, expert) == held.get(expert, -1)

    def _evictable(self, layer: int) -> int:
        """Slots that a visit may fill: free ones, and those that hold neither what is needed nor what is busy."""
        pool = self.pools[layer]
        kept = sum(
            p == pool and ((p, slot) in self.busy or held in self.pinned) for (p, slot), held in self.holds.items()
        )
        return self.slots[pool] - kept

    def _apply(self, layer: int, loads: list[Load]) -> None:
        pool = self.pools[layer]
        for load in loads:
            place = (pool, load.slot)
            assert 0 <= load.slot < self.slots[pool]
            assert self.holds.get(place, (-1, -1)) == (load.evicted_layer, load.evicted_expert)
            if place in self.holds:
                assert place not in self.busy
                assert self.holds[place] not in self.pinned
            assert (layer, load.expert) not in self.holds.values()
            self.holds[place] = (layer, load.expert)
        assert len({load.slot for load in loads}) == len(loads)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), layers=st.integers(1, 5), experts=st.integers(1, 12), data=st.data())
def test_the_rules_hold_and_both_copies_decide_the_same(
    seed: int, layers: int, experts: int, data: st.DataObject
) -> None:
    pools = data.draw(st.lists(st.integers(0, 2), min_size=layers, max_size=layers))
    slots = [data.draw(st.integers(0, experts * pools.count(pool))) for pool in range(3)]
    draw, policy, layer = random.Random(seed), Checked(layers, experts, pools, slots), -1
    for _ in range(150):
        anywhere, some = draw.randrange(layers), draw.sample(range(experts), draw.randint(0, experts))
        match draw.choices(["visit", "prefetch", "preload", "busy", "forget"], [10, 4, 1, 2, 1]):
            case ["visit"]:
                layer = (layer + 1) % layers if draw.random() < 0.9 else anywhere
                hot = list(dict.fromkeys(int(experts * draw.random() ** 2) for _ in range(4)))
                policy.visit(layer, hot if draw.random() < 0.8 else some)
            case ["prefetch"]:
                policy.prefetch(anywhere, some, draw.randint(0, 4))
            case ["preload"]:
                policy.preload(anywhere, some)
            case ["busy"]:
                places = [(pool, slot) for pool, count in enumerate(slots) for slot in range(count)]
                if places:
                    policy.set_busy(*draw.choice(places), draw.random() < 0.4)
            case ["forget"]:
                policy.forget(anywhere, draw.randrange(experts))
    policy.agree()


@pytest.mark.parametrize("copy", COPIES)
def test_a_cyclic_scan_keeps_what_fits(copy: Any) -> None:
    """Every expert of every layer in every step: the best policy hits (slots - layer) / (all - layer), LRU never."""
    policy, hits, uses = copy(8, 10, pools=[0] * 8, slots=[40]), 0, 0
    for step in range(20):
        for layer in range(8):
            held = set(policy.resident(layer))
            policy.visit(layer, list(range(10)))
            if step >= 5:
                hits += len(held)
                uses += 10
    assert hits / uses > 0.9 * (40 - 10) / (80 - 10)


@pytest.mark.parametrize("copy", COPIES)
def test_what_is_often_used_stays_and_what_was_used_once_goes(copy: Any) -> None:
    policy = copy(2, 8, pools=[0, 0], slots=[6])
    for step in range(12):
        for layer in range(2):
            policy.visit(layer, [0, 1, 2 + step % 6])
    assert all({0, 1} <= set(policy.resident(layer)) for layer in range(2))


@pytest.mark.parametrize("copy", COPIES)
def test_of_equals_the_one_whose_layer_is_furthest_goes(copy: Any) -> None:
    policy = copy(4, 4, pools=[0] * 4, slots=[4])
    for _ in range(3):
        for layer in range(4):
            policy.visit(layer, [0])
    (load,) = plain(policy.visit(0, [0, 1]))
    assert (load.evicted_layer, load.evicted_expert) == (3, 0)


@pytest.mark.parametrize("copy", COPIES)
def test_predicted_experts_are_read_ahead_and_kept_until_their_visit(copy: Any) -> None:
    policy = copy(3, 8, pools=[0] * 3, slots=[6])
    for step in range(12):
        for layer in range(3):
            policy.visit(layer, [step % 4, 4 + step % 4])
    policy.visit(0, [0, 4])
    before = policy.resident(1)
    loads = plain(policy.prefetch(1, [6, 2], 1))
    assert len(before) > 0
    assert [load.expert for load in loads] == [6]
    assert loads[0].evicted_layer >= 0
    assert plain(policy.prefetch(1, [6, 2], 0)) == []
    assert plain(policy.visit(1, [6])) == []


@pytest.mark.parametrize("copy", COPIES)
def test_a_pool_without_slots_and_one_with_all(copy: Any) -> None:
    policy = copy(2, 4, pools=[0, 1], slots=[0, 4])
    for step in range(3):
        assert plain(policy.visit(0, [1, 2])) == []
        assert plain(policy.prefetch(0, [1], 1)) == []
        assert [load.evicted_expert for load in plain(policy.visit(1, [0, 1, 2, 3]))] == ([-1] * 4 if step == 0 else [])
    assert policy.resident(0) == []


@pytest.mark.parametrize("copy", COPIES)
def test_what_is_not_there_is_refused_and_changes_nothing(copy: Any) -> None:
    for arguments in [
        (0, 4, [], []),
        (1, 0, [0], [0]),
        (2, 4, [0], [4]),
        (2, 4, [0, 1], [4]),
        (2, 4, [0, -1], [4]),
        (2, 4, [0, 0], [9]),
        (2, 4, [0, 0], [-1]),
        (2, 4, [0, 0], [4, 1]),
    ]:
        with pytest.raises(ValueError, match=r"must|needs|cannot"):
            copy(arguments[0], arguments[1], pools=arguments[2], slots=arguments[3])
    policy, untouched = (copy(2, 4, pools=[0, 0], slots=[3]) for _ in range(2))
    for call in [
        lambda: policy.visit(2, [0]),
        lambda: policy.visit(0, [0, 4]),
        lambda: policy.visit(0, [-1]),
        lambda: policy.visit(0, [1, 2, 1]),
        lambda: policy.prefetch(-1, [0], 1),
        lambda: policy.prefetch(0, [3, 3], 1),
        lambda: policy.prefetch(0, [0], -1),
        lambda: policy.slot_of(0, 4),
        lambda: policy.resident(5),
        lambda: policy.forget(-1, 0),
        lambda: policy.set_busy(0, 3, True),
        lambda: policy.set_busy(1, 0, True),
        lambda: policy.set_busy(0, -1, False),
    ]:
        with pytest.raises(ValueError, match=r"there is no|numbered|twice|negative"):
            call()
    for layer, experts in [(0, [1, 2]), (1, [0, 3]), (0, [3])]:
        assert plain(policy.visit(layer, experts)) == plain(untouched.visit(layer, experts))
