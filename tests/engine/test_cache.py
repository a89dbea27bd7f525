"""The prefix cache over a memory that remembers which tokens each sequence holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.engine.cache import AdapterSet, Entry, PrefixCache, common_prefix
from edgellm.engine.types import AdapterUse

BASE: AdapterSet = ()
TONE: AdapterSet = (AdapterUse("tone"),)
LONG = list(range(100))


class _Memory:
    """What a context would hold: the tokens of each sequence."""

    def __init__(self) -> None:
        self.held: dict[int, list[int]] = {}
        self.copies = 0
        self.saves = 0
        self.lost: dict[int, int] = {}  # how many first positions a sequence has lost to others, window or not
        self.scattered = False  # when set, nothing can be brought back

    def remove(self, sequence: int, start: int = 0, end: int = -1) -> bool:
        assert end == -1
        del self.held.setdefault(sequence, [])[start:]
        return True

    def copy(self, source: int, target: int, end: int) -> None:
        assert not self.held.get(target)
        held = self.held.get(source, [])
        assert len(held) >= end
        self.copies += 1
        self.held[target] = held[:end]

    def saved_bytes(self, sequence: int) -> int:
        return 8 * len(self.held[sequence])

    def first_position(self, sequence: int) -> int:
        return self.lost.get(sequence, 0)

    def save(self, sequence: int) -> np.ndarray:
        self.saves += 1
        return np.array(self.held[sequence], np.int64).view(np.uint8)

    def load(self, sequence: int, data: np.ndarray) -> bool:
        if not self.scattered:
            self.held[sequence] = data.view(np.int64).tolist()
        return not self.scattered


class _Cache(PrefixCache):
    """A cache of small measures, with its memory at hand."""

    def __init__(
        self, capacity: int = 1000, sequences: int = 8, idle_cells: int = 1000, saved_bytes: int = 0, **more: int
    ) -> None:
        self.memory = _Memory()
        super().__init__(
            self.memory, capacity, sequences=sequences, idle_cells=idle_cells, saved_bytes=saved_bytes, **more
        )

    def compute(self, entry: Entry, tokens: Sequence[int]) -> None:
        assert self.reserve(len(tokens))
        self.append(entry, tokens)
        self.memory.held.setdefault(entry.sequence, []).extend(tokens)

    def finished(self, tokens: Sequence[int], adapters: AdapterSet = BASE) -> Entry:
        """A sequence that computed `tokens` and ended."""
        entry = self.acquire(tokens, adapters)
        self.compute(entry, tokens[len(entry.tokens) :])
        self.retire(entry)
        return entry

    def check(self) -> None:
        """What the cache believes is what the memory holds, and every cell is accounted for."""
        entries = [*self._live.values(), *self._idle.values()]
        assert all(self.memory.held.get(entry.sequence, []) == entry.tokens for entry in entries)
        assert all(len(entry.cells) == len(entry.tokens) == len(set(entry.cells)) for entry in entries)
        assert self.ledger.used == len({cell for entry in entries for cell in entry.cells})
        ids = [*self._free_ids, *self._live, *self._idle]
        assert len(ids) == len(set(ids))
        assert not any(self.memory.held.get(sequence) for sequence in self._free_ids)


@given(st.lists(st.integers(0, 1), max_size=600), st.integers(0, 600), st.lists(st.integers(0, 2), max_size=5))
def test_common_prefix(left: list[int], keep: int, rest: list[int]) -> None:
    right = [*left[:keep], *rest]
    expected = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    assert common_prefix(left, right) == common_prefix(right, left) == expected


class TestAcquire:
    def test_the_longest_prefix_wins(self) -> None:
        cache = _Cache()
        for length in (10, 30, 20):
            cache.finished([*LONG[:length], 500 + length, 501])
        entry = cache.acquire(LONG, BASE)
        assert entry.tokens == LONG[:30]
        assert (cache.lookups, cache.hits) == (4, 3)
        cache.check()

    def test_a_whole_idle_sequence_is_taken_over_without_a_copy(self) -> None:
        cache = _Cache()
        first = cache.finished(LONG[:50])
        entry = cache.acquire(LONG, BASE)
        assert (entry, entry.tokens, cache.memory.copies) == (first, LONG[:50], 0)
        assert cache.idle_entries == 0
        cache.check()

    def test_a_part_of_it_is_shared_and_the_rest_stays(self) -> None:
        cache = _Cache()
        cache.finished(LONG[:50])
        entry = cache.acquire([*LONG[:20], 7, 8], BASE)
        assert (entry.tokens, cache.memory.copies, cache.idle_entries) == (LONG[:20], 1, 1)
        assert cache.ledger.used == 50
        cache.check()

    def test_one_token_is_left_to_compute(self) -> None:
        cache = _Cache()
        cache.finished(LONG)
        assert cache.acquire(LONG, BASE).tokens == LONG[:-1]

    def test_a_live_sequence_is_shared(self) -> None:
        cache = _Cache()
        live = cache.acquire(LONG, BASE)
        cache.compute(live, LONG)
        other = cache.acquire([*LONG, 5], BASE)
        assert (other.tokens, cache.ledger.used) == (LONG, 100)
        cache.discard(live)
        assert cache.ledger.used == 100
        cache.discard(other)
        assert cache.ledger.used == 0
        cache.check()

    def test_adapter_sets_are_kept_apart(self) -> None:
        cache = _Cache()
        cache.finished(LONG, TONE)
        for other in (BASE, (AdapterUse("tone", 0.5),), (AdapterUse("tone"), AdapterUse("more"))):
            assert cache.acquire(LONG, other).tokens == []
        assert cache.acquire(LONG, TONE).tokens == LONG[:-1]

    def test_drop_adapter_forgets_what_was_made_with_it(self) -> None:
        cache = _Cache(saved_bytes=1 << 20)
        cache.finished(LONG)
        cache.finished(LONG, TONE)
        cache.drop_adapter("tone")
        assert cache.acquire(LONG, TONE).tokens == []
        assert cache.acquire(LONG, BASE).tokens == LONG[:-1]
        cache.check()

    def test_when_ids_run_out_the_oldest_idle_sequence_goes(self) -> None:
        cache = _Cache(sequences=3)
        for start in (0, 1000, 2000):
            cache.finished(range(start, start + 10))
        cache.acquire(range(5000, 5010), BASE)
        assert cache.idle_entries == 2
        assert cache.acquire([*range(10), 99], BASE).tokens == []  # the first was forgotten
        cache.check()

    def test_a_recurrent_state_is_only_continued_from_its_end(self) -> None:
        cache = _Cache(can_roll_back=False)
        cache.finished(LONG[:50])
        assert cache.acquire([*LONG[:40], 7, 8], BASE).tokens == []
        assert cache.acquire(LONG[:50], BASE).tokens == []
        taken = cache.acquire(LONG, BASE)
        assert taken.tokens == LONG[:50]
        assert cache.acquire(LONG, BASE).tokens == []  # it belongs to one sequence
        assert cache.memory.copies == 0
        cache.check()


class TestRoom:
    def test_reserve_evicts_the_least_recently_used_first(self) -> None:
        cache = _Cache(capacity=100)
        for start in (0, 1000, 2000):
            cache.finished(range(start, start + 30))
        cache.discard(cache.acquire([*range(20), 7], BASE))  # the first is used again
        assert cache.evictable == 90
        assert cache.reserve(30)
        assert cache.idle_entries == 2
        assert cache.acquire([*range(1000, 1020), 7], BASE).tokens == []
        assert len(cache.acquire([*range(20), 7], BASE).tokens) == 20
        cache.check()

    def test_reserve_leaves_the_living_alone(self) -> None:
        cache = _Cache(capacity=100)
        live = cache.acquire(range(60), BASE)
        cache.compute(live, range(60))
        cache.finished(range(1000, 1030))
        assert not cache.reserve(41)
        assert (cache.ledger.used, cache.idle_entries, cache.reserve(40)) == (60, 0, True)
        cache.check()

    def test_evictable_does_not_count_what_the_living_share(self) -> None:
        cache = _Cache()
        cache.finished(LONG)
        cache.acquire([*LONG[:60], 7, 8], BASE)
        assert cache.evictable == 40

    def test_finished_sequences_keep_what_they_may(self) -> None:
        cache = _Cache(idle_cells=50)
        for start in (0, 1000, 2000):
            cache.finished(range(start, start + 20))
        assert (cache.idle_entries, cache.ledger.used) == (2, 40)
        cache.finished(range(5000, 5300))  # the last one stays, however long
        assert (cache.idle_entries, cache.ledger.used) == (1, 300)

    def test_an_empty_sequence_is_not_remembered(self) -> None:
        cache = _Cache()
        cache.retire(cache.acquire(LONG, BASE))
        assert cache.idle_entries == 0
        cache.check()

    def test_truncate_and_fork(self) -> None:
        cache = _Cache()
        entry = cache.acquire(LONG, BASE)
        cache.compute(entry, LONG)
        twin = cache.fork(entry)
        cache.truncate(entry, 90)
        cache.truncate(entry, 95)
        assert (len(entry.tokens), len(twin.tokens), cache.ledger.used) == (90, 100, 100)
        cache.truncate(twin, 80)
        assert cache.ledger.used == 90
        cache.check()


class TestSaved:
    def test_what_leaves_the_cells_comes_back(self) -> None:
        cache = _Cache(capacity=150, saved_bytes=1 << 20)
        cache.finished(LONG)
        assert cache.reserve(150)
        assert (cache.ledger.used, cache.saved_bytes) == (0, 800)
        entry = cache.acquire([*LONG[:90], 7, 8], BASE)
        assert entry.tokens == LONG[:90]
        assert (cache.lookups, cache.hits) == (2, 1)
        cache.check()

    @pytest.mark.parametrize("adapters", [TONE])
    def test_but_not_for_another_adapter_set(self, adapters: AdapterSet) -> None:
        cache = _Cache(capacity=150, saved_bytes=1 << 20)
        cache.finished(LONG)
        cache.reserve(150)
        assert cache.acquire(LONG, adapters).tokens == []

    def test_nor_after_its_adapter_was_dropped(self) -> None:
        cache = _Cache(capacity=150, saved_bytes=1 << 20)
        cache.finished(LONG, TONE)
        cache.reserve(150)
        cache.drop_adapter("tone")
        assert (cache.saved_bytes, cache.acquire(LONG, TONE).tokens) == (0, [])

    def test_the_bytes_are_bounded_and_the_oldest_goes(self) -> None:
        cache = _Cache(capacity=1000, saved_bytes=1700)
        for start in (0, 1000, 2000):
            cache.finished(range(start, start + 100))
        cache.reserve(1000)
        assert cache.saved_bytes == 1600
        assert cache.acquire([*range(100), 7], BASE).tokens == []
        assert len(cache.acquire([*range(2000, 2100), 7], BASE).tokens) == 100

    def test_scattered_cells_cost_the_saving_nothing_more(self) -> None:
        cache = _Cache(capacity=150, saved_bytes=1 << 20)
        cache.finished(LONG)
        cache.reserve(150)
        cache.memory.scattered = True
        assert cache.acquire(LONG, BASE).tokens == []
        cache.check()

    def test_room_made_in_vain_may_have_taken_the_shorter_prefix(self) -> None:
        cache = _Cache(capacity=150, saved_bytes=1 << 20)
        cache.finished(LONG)
        cache.reserve(150)
        cache.finished([*LONG[:10], *range(500, 560)])
        cache.memory.scattered = True
        hits = cache.hits
        assert cache.acquire(LONG, BASE).tokens == []
        assert cache.hits == hits
        cache.check()


class TestSlidingWindow:
    """What lies further back than the window may be gone, from the cells as from what was saved."""

    def test_a_part_is_shared_while_its_window_is_there(self) -> None:
        cache = _Cache(window=10)
        entry = cache.finished(LONG)
        assert len(cache.acquire([*LONG[:60], 7], BASE).tokens) == 60
        cache.memory.lost[entry.sequence] = 51
        assert len(cache.acquire([*LONG[:61], 7], BASE).tokens) == 61
        assert len(cache.acquire([*LONG[:50], 7], BASE).tokens) == 50  # from the one that was given 60
        cache.check()

    def test_nor_shared_when_it_has_gone(self) -> None:
        cache = _Cache(window=10)
        cache.memory.lost[cache.finished(LONG).sequence] = 90
        assert cache.acquire([*LONG[:60], 7], BASE).tokens == []
        assert cache.acquire([*LONG, 7], BASE).tokens == LONG

    @pytest.mark.parametrize("kind", [{"window": 10}, {"can_roll_back": False}])
    def test_what_was_saved_is_continued_at_its_end_only(self, kind: dict[str, int]) -> None:
        cache = _Cache(capacity=150, saved_bytes=1 << 20, **kind)
        cache.finished(LONG)
        cache.reserve(150)
        assert cache.acquire([*LONG[:90], 7], BASE).tokens == []
        assert cache.acquire([*LONG, 7], BASE).tokens == LONG
        cache.check()

    @pytest.mark.parametrize("kind", [{"window": 10}, {"can_roll_back": False}])
    def test_a_longer_one_does_not_stand_in_for_a_shorter(self, kind: dict[str, int]) -> None:
        cache = _Cache(capacity=300, saved_bytes=1 << 20, **kind)
        cache.finished(LONG[:70])
        cache.reserve(300)
        entry = cache.acquire(LONG, BASE)
        cache.compute(entry, LONG[len(entry.tokens) :])
        cache.retire(entry)
        cache.finished(LONG[:70])
        cache.reserve(300)
        assert len(cache.acquire([*LONG[:70], 7], BASE).tokens) == 70


class TestMovingOut:
    """Attention scans what is idle in the cells, too: so it goes to ordinary memory when something else starts."""

    def test_a_new_prompt_has_the_cells_to_itself(self) -> None:
        cache = _Cache(saved_bytes=1 << 20)
        cache.finished(LONG)
        entry = cache.acquire(range(500, 600), BASE)
        assert (cache.ledger.used, cache.saved_bytes, entry.tokens) == (0, 800, [])
        assert cache.acquire(LONG, BASE).tokens == LONG[:-1]
        cache.check()

    def test_what_it_continues_stays(self) -> None:
        cache = _Cache(saved_bytes=1 << 20)
        cache.finished(range(500, 600))
        cache.finished(LONG)
        assert (cache.acquire([*LONG, 7], BASE).tokens, cache.ledger.used) == (LONG, 100)
        cache.check()

    def test_what_begins_alike_for_the_most_part_stays(self) -> None:
        cache = _Cache(saved_bytes=1 << 20)
        cache.finished(LONG)
        assert len(cache.acquire([*LONG[:60], 7, 8], BASE).tokens) == 60
        assert (cache.ledger.used, cache.idle_entries) == (100, 1)

    def test_what_begins_alike_for_the_least_part_goes(self) -> None:
        cache = _Cache(saved_bytes=1 << 20)
        cache.finished(LONG)
        assert len(cache.acquire([*LONG[:40], 7, 8], BASE).tokens) == 40
        assert (cache.ledger.used, cache.idle_entries) == (40, 0)
        cache.check()

    def test_what_is_too_large_to_save_stays(self) -> None:
        cache = _Cache(saved_bytes=100)
        cache.finished(LONG)
        cache.acquire(range(500, 600), BASE)
        assert (cache.ledger.used, cache.idle_entries) == (100, 1)
        assert cache.memory.saves == 0  # its size is known before it is copied

    def test_without_memory_for_it_everything_stays(self) -> None:
        cache = _Cache(saved_bytes=0)
        cache.finished(LONG)
        cache.finished([1, 2, 3])
        cache.acquire(range(500, 600), BASE)
        assert cache.idle_entries == 2


_TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=12)
_ACTIONS = st.one_of(
    st.tuples(st.just("start"), _TOKENS, st.sampled_from([BASE, TONE])),
    st.tuples(st.just("grow"), _TOKENS, st.integers(0, 5)),
    st.tuples(
        st.sampled_from(["retire", "discard", "fork", "cut", "room", "drop", "scatter"]),
        st.just([0]),
        st.integers(0, 120),
    ),
)


class TestSettling:
    def test_what_lies_scattered_leaves_the_cells_and_comes_back(self) -> None:
        cache = _Cache(capacity=4000, idle_cells=100, saved_bytes=1 << 20)
        crowd = [cache.acquire(list(range(n, n + 200)), BASE) for n in (1000, 2000, 3000, 4000)]
        for n, entry in zip((1000, 2000, 3000, 4000), crowd, strict=True):
            cache.compute(entry, list(range(n, n + 200)))
        for entry in crowd[:-1]:
            cache.retire(entry)
        cache.settle()
        assert cache.ledger.used > 0  # somebody is still running
        cache.retire(crowd[-1])
        cache.settle()
        assert (cache.ledger.used, cache.idle_entries) == (0, 0)
        assert len(cache.acquire(list(range(4000, 4300)), BASE).tokens) == 200

    def test_one_conversation_stays_where_it_is(self) -> None:
        cache = _Cache(capacity=4000, saved_bytes=1 << 20)
        cache.finished(list(range(900)))
        cache.settle()
        assert (cache.ledger.used, cache.saved_bytes) == (900, 0)

    def test_what_is_too_large_to_save_stays_where_it_is(self) -> None:
        cache = _Cache(capacity=4000, idle_cells=100, saved_bytes=800)
        crowd = [cache.acquire(list(range(n, n + 400)), BASE) for n in (1000, 2000, 3000)]
        for n, entry in zip((1000, 2000, 3000), crowd, strict=True):
            cache.compute(entry, list(range(n, n + 400)))
        for entry in crowd:
            cache.retire(entry)
        cache.settle()
        assert (cache.ledger.used, cache.saved_bytes) == (400, 0)


@settings(max_examples=150, deadline=None)
@given(st.lists(_ACTIONS, max_size=40), st.sampled_from([0, 1500]), st.integers(0, 90))
def test_the_books_balance_whatever_happens(actions: list, saved_bytes: int, idle_cells: int) -> None:  # type: ignore[type-arg]
    cache = _Cache(capacity=120, sequences=6, idle_cells=idle_cells, saved_bytes=saved_bytes)
    live: list[Entry] = []
    for kind, tokens, extra in actions:
        # Sequences repeat their tokens, so that some are long enough to be worth saving.
        if kind == "start" and len(live) < 4:
            entry = cache.acquire(tokens * 9, extra)
            assert entry.tokens == (tokens * 9)[: len(entry.tokens)]
            assert len(entry.tokens) < len(tokens * 9)
            live.append(entry)
        elif not live:
            continue
        elif kind == "grow" and cache.reserve(len(tokens)):
            cache.compute(live[extra % len(live)], tokens)
        elif kind == "retire":
            cache.retire(live.pop(extra % len(live)))
        elif kind == "discard":
            cache.discard(live.pop(extra % len(live)))
        elif kind == "fork" and len(live) < 4:
            live.append(cache.fork(live[extra % len(live)]))
        elif kind == "cut":
            cache.truncate(live[extra % len(live)], extra)
        elif kind == "room":
            cache.reserve(extra)
        elif kind == "drop":
            cache.drop_adapter("tone")
        elif kind == "scatter":
            cache.memory.scattered = not cache.memory.scattered
        cache.check()
        assert cache.saved_bytes <= saved_bytes
    for entry in live:
        cache.discard(entry)
    assert cache.reserve(120)
    assert cache.ledger.used == 0
