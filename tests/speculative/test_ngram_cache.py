"""The n-gram cache: what it finds, what it forgets, what it keeps on disk."""

from __future__ import annotations

import logging
import struct
import zlib
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgellm.speculative.ngram_cache import LONGEST_RUN, NgramCache, vocabulary_fingerprint
from tests.support.vocabularies import REAL, vocabulary

Run = tuple[int, ...]
HERE, THERE = bytes(range(32)), bytes(range(1, 33))

tokens = st.integers(0, 5)
runs = st.lists(tokens, min_size=2, max_size=4).map(tuple)


def test_the_longest_known_run_is_found() -> None:
    cache = NgramCache()
    cache.observe(10, [1, 2])
    cache.observe(11, [1, 2, 3, 4])
    cache.observe(12, [2, 3])
    assert cache.longest([1, 2, 3, 4, 5]) == (11, 4)
    assert cache.longest([1, 2, 3]) == (10, 2)
    assert cache.longest([0, 1, 2, 3], 2) == (12, 2)
    assert cache.longest([1, 3]) is cache.longest([1]) is cache.longest([9, 9]) is None
    assert (cache.get([1, 2]), cache.get([1, 2, 3])) == (10, -1)


def test_what_is_no_run_is_not_kept() -> None:
    cache = NgramCache()
    for run in ([], [1], [1] * (LONGEST_RUN + 1)):
        cache.observe(10, run)
    assert len(cache) == 0
    cache.observe(10, [1] * LONGEST_RUN)
    assert cache.longest([1] * (LONGEST_RUN + 5)) == (10, LONGEST_RUN)


def test_the_least_used_goes_and_of_these_the_least_recent() -> None:
    cache = NgramCache(capacity=3)
    for target, run in ((1, [1, 1]), (2, [2, 2]), (3, [3, 3]), (1, [1, 1]), (2, [2, 2])):
        cache.observe(target, run)
    cache.observe(4, [4, 4])  # 3 was seen once
    assert [cache.get([n, n]) for n in range(1, 5)] == [1, 2, -1, 4]
    cache.observe(4, [4, 4])
    cache.observe(5, [5, 5])  # all others were seen twice, 1 the longest ago
    assert [cache.get([n, n]) for n in range(1, 6)] == [-1, 2, -1, 4, 5]


def test_a_run_that_means_something_else_is_counted_anew() -> None:
    cache = NgramCache(capacity=2)
    for _ in range(5):
        cache.observe(1, [1, 1])
    cache.observe(2, [1, 1])
    cache.observe(3, [3, 3])
    cache.observe(3, [3, 3])
    assert cache.get([1, 1]) == 2
    cache.observe(4, [4, 4])
    assert (cache.get([1, 1]), cache.get([3, 3])) == (-1, 3)


class _Slow:
    """The same by going through everything."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.clock = capacity, 0
        self.entries: dict[Run, list[int]] = {}  # target token, uses, when last observed

    def observe(self, target: int, run: Run) -> None:
        self.clock += 1
        if run not in self.entries and len(self.entries) == self.capacity:
            del self.entries[min(self.entries, key=lambda other: self.entries[other][1:])]
        token, uses, _ = self.entries.get(run, (target, 0, 0))
        self.entries[run] = [target, uses + 1 if token == target else 1, self.clock]

    def longest(self, run: list[int], start: int) -> tuple[int, int] | None:
        known = [other for other in self.entries if tuple(run[start : start + len(other)]) == other]
        best = max(known, key=len, default=None)
        return (self.entries[best][0], len(best)) if best else None


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 2), runs), max_size=60), st.lists(tokens, min_size=1))
def test_it_does_as_the_slow_one(capacity: int, seen: list[tuple[int, Run]], asked: list[int]) -> None:
    cache, slow = NgramCache(capacity=capacity), _Slow(capacity)
    for target, run in seen:
        cache.observe(target, run)
        slow.observe(target, run)
        assert len(cache) == len(slow.entries) <= capacity
    for start in range(len(asked)):
        assert cache.longest(asked, start) == slow.longest(asked, start)
    assert all(cache.get(run) == entry[0] for run, entry in slow.entries.items())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seen=st.lists(st.tuples(tokens, runs), max_size=40), more=st.lists(st.tuples(tokens, runs), max_size=20))
def test_a_kept_cache_goes_on_where_it_was(tmp_path: Path, seen: list[tuple[int, Run]], more: list) -> None:
    cache, path = NgramCache(HERE, THERE, capacity=8), tmp_path / "cache"
    for target, run in seen:
        cache.observe(target, run)
    cache.save(path)
    again = NgramCache.load(path, HERE, THERE, capacity=8)
    for target, run in more:
        cache.observe(target, run)
        again.observe(target, run)
    every = {run for _, run in seen + more}
    assert [again.get(run) for run in every] == [cache.get(run) for run in every]
    assert {first: dict(lengths) for first, lengths in again._lengths.items()} == cache._lengths


def test_a_smaller_cache_takes_the_most_used(tmp_path: Path) -> None:
    cache = NgramCache(HERE, THERE)
    for token in range(10):
        for _ in range(1 + token % 5):
            cache.observe(token, [token, token])
    cache.save(tmp_path / "a" / "cache")  # the folder is made
    small = NgramCache.load(tmp_path / "a" / "cache", HERE, THERE, capacity=4)
    assert [token for token in range(10) if small.get([token, token]) >= 0] == [3, 4, 8, 9]


def _file(tmp_path: Path) -> tuple[Path, bytes]:
    cache = NgramCache(HERE, THERE)
    for token in range(50):
        cache.observe(token, [token, token + 1, token + 2])
    cache.save(tmp_path / "cache")
    return tmp_path / "cache", (tmp_path / "cache").read_bytes()


def test_a_cache_for_other_vocabularies_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = _file(tmp_path)
    assert len(NgramCache.load(path, HERE, THERE)) == 50
    assert caplog.records == []
    assert len(NgramCache.load(path, THERE, HERE)) == 0
    assert "other vocabularies" in caplog.text


def test_no_file_is_nothing_to_speak_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(NgramCache.load(tmp_path / "none", HERE, THERE)) == 0
    assert caplog.records == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, data: st.DataObject) -> None:
    path, raw = _file(tmp_path)
    cut = data.draw(st.booleans())
    if cut:
        wrong = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        at = data.draw(st.integers(0, len(raw) - 1))
        wrong = raw[:at] + bytes([raw[at] ^ data.draw(st.integers(1, 255))]) + raw[at + 1 :]
    path.write_bytes(wrong)
    caplog.clear()
    assert len(NgramCache.load(path, HERE, THERE)) in (
        (0,) if cut else (0, 50)
    )  # zlib's header has bits that mean nothing
    assert len(NgramCache.load(path, HERE, THERE)) == 50 or "begun anew" in caplog.text


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=12), st.integers(0, 6))
def test_any_numbers_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, flat: list, count: int) -> None:
    path = tmp_path_factory.getbasetemp() / "numbers"
    body = zlib.compress(struct.pack(f"<{len(flat)}I", *flat))
    path.write_bytes(struct.pack("<16s32s32sI", b"edgellm ngram 1\n", HERE, THERE, count) + body)
    assert len(NgramCache.load(path, HERE, THERE)) in (0, count)


@pytest.mark.parametrize(
    ("flat", "count", "kept"),
    [
        ([7, 1, 2, 5, 6, 8, 3, 2, 5, 5], 2, 2),
        ([8, 3, 2, 5, 5, 7, 1, 2, 5, 6], 2, 0),  # the most used comes last
        ([7, 0, 2, 5, 6], 1, 0),
        ([7, 1, 1, 5], 1, 0),
        ([7, 1, 3, 5, 6], 1, 0),
        ([7, 1, 2, 5, 6, 8, 1, 2, 5, 6], 2, 0),
        ([7, 1, 2, 5, 6], 2, 0),
        ([7, 1, 2, 5, 6, 9], 1, 0),
    ],
)
def test_what_a_file_must_hold(tmp_path: Path, flat: list[int], count: int, kept: int) -> None:
    body = zlib.compress(struct.pack(f"<{len(flat)}I", *flat))
    (tmp_path / "cache").write_bytes(struct.pack("<16s32s32sI", b"edgellm ngram 1\n", HERE, THERE, count) + body)
    assert len(NgramCache.load(tmp_path / "cache", HERE, THERE)) == kept


def test_an_unwritable_place_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        NgramCache(HERE, THERE).save(tmp_path / "file" / "cache")
        assert len(NgramCache.load(tmp_path / "file" / "cache", HERE, THERE)) == 0
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(("drafter", "capacity"), [(b"", 4), (HERE, 0)])
def test_settings_that_are_refused(drafter: bytes, capacity: int) -> None:
    with pytest.raises(ValueError, match="needs room"):
        NgramCache(drafter, THERE, capacity=capacity)


def test_families_have_fingerprints_of_their_own() -> None:
    prints = defaultdict(list)
    for name in (*REAL, "spaced", "bytes"):
        prints[vocabulary_fingerprint(vocabulary(name))].append(name)
    assert [names for names in prints.values() if len(names) > 1] == []
