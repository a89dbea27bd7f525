"""The store of experts on a file of its own: memory holds what the file holds, whatever the budget and the faults."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgellm import _kernels
from edgellm.backend.experts import ExpertStore, Slice, crc32c
from edgellm.errors import ModelLoadError

EXPERTS, LAYERS, COLUMNS, ROWS = 6, 3, 64, 48
Q8_0, F32 = 8, 0
SIZES = {Q8_0: COLUMNS * ROWS // 32 * 34, F32: COLUMNS * ROWS * 4}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    size = 17 + LAYERS * EXPERTS * (SIZES[Q8_0] + SIZES[F32])
    file = tmp_path / "experts.bin"
    file.write_bytes(np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes())
    return file


def slices() -> list[Slice]:
    """Two tensors a layer, one that is packed and one that is not, beginning at odd places."""
    found, offset = [], 17
    for layer in range(LAYERS):
        for kind, name in ((Q8_0, "Q8_0"), (F32, "F32")):
            found.append(Slice(f"{layer}.{name}", kind, name, COLUMNS, ROWS, layer, 0, offset, SIZES[kind]))
            offset += EXPERTS * SIZES[kind]
    return found


@contextlib.contextmanager
def a_store(
    path: Path,
    slots: int = 4,
    *,
    direct: bool = True,
    checksums: npt.NDArray[np.uint32] | None = None,
    pieces: list[Slice] | None = None,
) -> Iterator[ExpertStore]:
    pieces = pieces or slices()
    extent = max(piece.extent_bytes for piece in pieces)
    store = ExpertStore(
        pieces,
        [path],
        experts=EXPERTS,
        pools=[0] * LAYERS,
        slots=[slots],
        stream_bytes=2 * extent,
        direct=direct,
        checksums=checksums,
    )
    try:
        yield store
    finally:
        store.close()


def expected(path: Path, piece: Slice, expert: int) -> bytes:
    raw = np.fromfile(path, np.uint8, piece.n_bytes, offset=piece.offset_of(expert))
    return _kernels.pack(piece.type, COLUMNS, ROWS, raw).tobytes() if piece.packed else raw.tobytes()


def fetched(store: ExpertStore, piece: Slice, experts: list[int]) -> dict[int, bytes]:
    return dict(store.native.fetch(piece.name, experts))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("slots", [0, 1, 4, EXPERTS * LAYERS])
def test_what_is_fetched_is_what_the_file_holds(path: Path, slots: int, direct: bool) -> None:
    draw = np.random.default_rng(1)
    with a_store(path, slots, direct=direct) as store:
        for _ in range(20):
            for layer in range(LAYERS):
                experts = sorted(draw.choice(EXPERTS, draw.integers(1, EXPERTS + 1), replace=False).tolist())
                for piece in slices()[2 * layer : 2 * layer + 2]:
                    found = fetched(store, piece, experts)
                    assert found == {expert: expected(path, piece, expert) for expert in experts}
        stats = store.stats
        assert stats.visits == 20 * LAYERS
        assert stats.needed == stats.hits + stats.loads + stats.streamed
        assert store.resident_bytes <= slots * sum(piece.extent_bytes for piece in slices()[:2])
        assert (stats.hits > 0) == (slots > 1)


def test_each_matrix_is_read_once_in_a_visit(path: Path) -> None:
    with a_store(path, 2) as store:
        for piece in slices()[:2]:
            fetched(store, piece, list(range(EXPERTS)))
        assert store.stats.reads == 2 * EXPERTS
        assert store.stats.bytes == EXPERTS * (SIZES[Q8_0] + SIZES[F32])


def test_reading_ahead(path: Path) -> None:
    with a_store(path) as store:
        store.prefetch(1, [2, 3])
        while store.stats.reads < 4:
            time.sleep(0.001)
        fetched(store, slices()[2], [2, 5])
        fetched(store, slices()[3], [2, 5])
        stats = store.stats
        assert (stats.prefetched, stats.prefetch_used, stats.hits, stats.loads) == (2, 1, 0, 1)
        assert fetched(store, slices()[3], [2])[2] == expected(path, slices()[3], 2)


def test_counts_and_the_log_of_nothing(path: Path) -> None:
    with a_store(path) as store:
        fetched(store, slices()[0], [0, 3])
        fetched(store, slices()[0], [3])
        assert store.counts().tolist() == [[1, 0, 0, 2, 0, 0], [0] * EXPERTS, [0] * EXPERTS]
        assert store.take_log().size == 0


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Whoever has the file open can no longer read it: its descriptors are exchanged for ones that only write."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == str(path):
                found.append(int(name))
    saved = [(descriptor, os.dup(descriptor)) for descriptor in found]
    writer = os.open(path, os.O_WRONLY)
    for descriptor in found:
        os.dup2(writer, descriptor)
    assert saved
    try:
        yield
    finally:
        for descriptor, copy in saved:
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(writer)


@pytest.mark.parametrize("slots", [0, 1, 4])
def test_a_read_error_is_told_once_and_then_all_is_well(path: Path, slots: int) -> None:
    with a_store(path, slots) as store:
        first = slices()[0]
        with unreadable(path):
            assert fetched(store, first, [0, 1, 2, 3]) == {}
            assert store.failed
            assert fetched(store, slices()[1], [0, 1]) == {}  # until somebody has heard of it
            message = store.take_error()
            assert re.fullmatch(
                r"cannot read expert [0-3] of 0\.(Q8_0|F32) from experts\.bin: Bad file descriptor", message
            )
            assert not store.failed
            fetched(store, first, [4])
            assert "cannot read expert 4 of 0." in store.take_error()
        for piece in slices()[:2]:
            assert fetched(store, piece, [0, 1, 4]) == {e: expected(path, piece, e) for e in (0, 1, 4)}
        assert not store.failed


def test_a_failed_read_ahead_concerns_no_step_that_does_without(path: Path) -> None:
    with a_store(path, EXPERTS * LAYERS) as store:
        for piece in slices()[:2]:
            fetched(store, piece, [0])
        held = store.resident_bytes
        with unreadable(path):
            store.prefetch(1, [2, 3])
            store.preload(2, [1])
            while store.resident_bytes > held:  # until what cannot be read has been given up
                time.sleep(0.001)
            assert fetched(store, slices()[0], [0]) == {0: expected(path, slices()[0], 0)}
            assert not store.failed
            store.prefetch(1, [2])
            assert fetched(store, slices()[2], [2]) == {}  # this one is needed
            assert "cannot read expert 2 of 1." in store.take_error()
        assert fetched(store, slices()[2], [2, 3]) == {e: expected(path, slices()[2], e) for e in (2, 3)}


def test_preloading_fills_free_slots_and_counts_as_nothing(path: Path) -> None:
    with a_store(path, 4) as store:
        store.preload(1, [5, 2, 3])
        store.preload(2, [0, 1])  # for the second there is no slot
        for piece in slices()[2:4]:
            assert fetched(store, piece, [2, 3]) == {e: expected(path, piece, e) for e in (2, 3)}
        stats = store.stats
        assert (stats.prefetched, stats.prefetch_used, stats.loads, stats.hits) == (0, 0, 0, 2)
        while store.stats.reads < 8:
            time.sleep(0.001)
        assert store.stats.reads == 8


def test_matrices_beside_each_other_are_read_at_once(path: Path) -> None:
    """As in a pack: an expert's matrices follow each other, then comes the next expert."""
    draw, record = np.random.default_rng(3), 4096 * 5
    offset, beside = 4096, []
    for layer in range(LAYERS):
        at = offset
        for kind, name in ((Q8_0, "Q8_0"), (F32, "F32")):
            offsets = tuple(at + expert * record for expert in range(EXPERTS))
            beside.append(
                Slice(f"{layer}.{name}", kind, name, COLUMNS, ROWS, layer, 0, at, SIZES[kind], offsets=offsets)
            )
            at += -(-SIZES[kind] // 64) * 64
        offset += EXPERTS * record
    path.write_bytes(draw.integers(0, 256, offset, np.uint8).tobytes())
    with a_store(path, 5, pieces=beside) as store:
        for _ in range(10):
            for piece in beside:
                experts = sorted(draw.choice(EXPERTS, 2, replace=False).tolist())
                assert fetched(store, piece, experts) == {e: expected(path, piece, e) for e in experts}
    with a_store(path, EXPERTS * LAYERS, pieces=beside) as store:
        for piece in beside:
            fetched(store, piece, list(range(EXPERTS)))
        assert store.stats.reads == EXPERTS * LAYERS
        assert store.stats.bytes == EXPERTS * LAYERS * (SIZES[Q8_0] + SIZES[F32])


def test_experts_of_two_pools_are_read_apart(tmp_path: Path) -> None:
    """Slots of the same number, and matrices that lie beside each other in the file, of different layers."""
    path, size, large = tmp_path / "pools.bin", SIZES[Q8_0], 1 << 22
    path.write_bytes(np.random.default_rng(4).integers(0, 256, 2 * EXPERTS * size, np.uint8).tobytes())
    os.truncate(path, 2 * EXPERTS * size + EXPERTS * large)
    pieces = [
        Slice(f"{layer}.Q8_0", Q8_0, "Q8_0", COLUMNS, ROWS, layer, 0, 0, size,
              offsets=tuple((2 * expert + layer) * size for expert in range(EXPERTS)))
        for layer in range(2)
    ]  # fmt: skip
    keeps_busy = Slice("2.F32", F32, "F32", 1 << 10, 1 << 10, 2, 0, 2 * EXPERTS * size, large)
    store = ExpertStore(
        [*pieces, keeps_busy], [path], experts=EXPERTS, pools=[0, 1, 2], slots=[EXPERTS] * 3, stream_bytes=3 * large
    )
    try:
        for layer in (2, 0, 1):
            store.preload(layer, range(EXPERTS))
        for _ in range(5000):  # until all is there, which it may never be
            if store.stats.reads == 3 * EXPERTS:
                break
            time.sleep(0.001)
        for piece in pieces:
            assert fetched(store, piece, list(range(EXPERTS))) == {
                expert: expected(path, piece, expert) for expert in range(EXPERTS)
            }
        fetched(store, keeps_busy, list(range(EXPERTS)))
        assert (store.stats.reads, store.stats.loads) == (3 * EXPERTS, 0)
    finally:
        store.close()


@pytest.mark.parametrize(("kind", "name"), [(Q8_0, "Q8_0"), (F32, "F32")])
def test_tensors_of_few_small_experts_are_read_at_once(tmp_path: Path, kind: int, name: str) -> None:
    path, size = tmp_path / "few.bin", {Q8_0: 16 * 32 // 32 * 34, F32: 16 * 32 * 4}[kind]
    path.write_bytes(np.random.default_rng(5).integers(0, 256, 4 * size, np.uint8).tobytes())
    pieces = [Slice(f"0.{n}", kind, name, 32, 16, 0, 0, 2 * n * size, size) for n in range(2)]
    store = ExpertStore(pieces, [path], experts=2, pools=[0], slots=[2], stream_bytes=2 * pieces[0].extent_bytes)
    try:
        for piece in pieces:
            found = fetched(store, piece, [0, 1])
            for expert in range(2):
                raw = np.fromfile(path, np.uint8, size, offset=piece.offset_of(expert))
                whole = _kernels.pack(kind, 32, 16, raw).tobytes() if piece.packed else raw.tobytes()
                assert found[expert] == whole
    finally:
        store.close()


def test_a_needed_experts_slot_is_not_given_away_when_its_rest_cannot_be_read(path: Path) -> None:
    """The first matrix is there and in use, the second fails ahead of its turn: the step fails."""
    pieces = slices()[:4]
    raw = path.read_bytes()
    sums = np.array(
        [[crc32c(raw[p.offset_of(e) : p.offset_of(e) + p.n_bytes]) for e in range(EXPERTS)] for p in pieces], np.uint32
    )
    sums[3, 2] ^= 1
    extent = max(piece.extent_bytes for piece in pieces)
    for _ in range(20):
        store = ExpertStore(
            pieces, [path], experts=EXPERTS, pools=[0, 0], slots=[1], stream_bytes=2 * extent, checksums=sums
        )
        try:
            store.prefetch(1, [2])
            got = fetched(store, pieces[2], [2])
            store.prefetch(0, [1])
            if got:
                assert got[2] == expected(path, pieces[2], 2)
            fetched(store, pieces[3], [2])
            assert "is damaged" in store.take_error()
        finally:
            store.close()


def test_a_file_that_gives_less_than_it_says() -> None:
    """Files of sysfs have a page's size and a line's content, and no unbuffered reads."""
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not file.is_file():
        pytest.skip("there is no such file here")
    piece = Slice("0.F32", F32, "F32", 32, 8, 0, 0, 0, 1024)
    store = ExpertStore([piece], [file], experts=4, pools=[0], slots=[4], stream_bytes=2 * piece.extent_bytes)
    try:
        assert not store.direct
        assert store.native.fetch("0.F32", [1]) == []
        assert "it ends before that" in store.take_error()
    finally:
        store.close()


@pytest.mark.parametrize("change", ["shorter", "longer", "rewritten"])
def test_a_file_that_changes_is_noticed(path: Path, change: str) -> None:
    with a_store(path) as store:
        assert fetched(store, slices()[0], [0])
        if change == "shorter":
            os.truncate(path, path.stat().st_size - 1)
        elif change == "longer":
            os.truncate(path, path.stat().st_size + 1)
        else:
            with path.open("r+b") as file:
                file.write(b"x")
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        fetched(store, slices()[0], [1])
        assert "changed while it was in use" in store.take_error()


def test_a_deleted_file_is_served_on_and_noticed(path: Path) -> None:
    with a_store(path) as store:
        whole = expected(path, slices()[0], 2)
        assert not store.deleted
        path.unlink()
        assert fetched(store, slices()[0], [2]) == {2: whole}
        assert store.deleted


def test_what_does_not_fit_its_checksum_is_an_error(path: Path) -> None:
    raw = path.read_bytes()
    starts = [(piece.offset + expert * piece.n_bytes, piece.n_bytes) for piece in slices() for expert in range(EXPERTS)]
    sums = np.array([crc32c(raw[start : start + size]) for start, size in starts], np.uint32)
    facts, piece = path.stat(), slices()[2]
    with path.open("r+b") as file:  # a bit of expert 3 turns over, unnoticed by the file system
        file.seek(piece.offset + 3 * piece.n_bytes + 1000)
        file.write(bytes([raw[piece.offset + 3 * piece.n_bytes + 1000] ^ 4]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with a_store(path, checksums=sums) as store:
        for other in slices():
            assert len(fetched(store, other, [0, 2, 5])) == 3
        assert 3 not in fetched(store, piece, [1, 3])
        assert "expert 3 of 1.Q8_0 is damaged" in store.take_error()
        assert 2 in fetched(store, piece, [2])


def test_crc32c() -> None:
    """The check value of the polynomial, and every length beside another implementation: bit by bit."""
    assert crc32c(b"123456789") == 0xE3069283
    data = bytes(range(200, 240))
    for size in range(len(data)):
        value = 0xFFFFFFFF
        for byte in data[:size]:
            value ^= byte
            for _ in range(8):
                value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        assert crc32c(data[:size]) == value ^ 0xFFFFFFFF


def test_files_that_are_not_there_or_too_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ModelLoadError, match="beyond the end"), a_store(path):
        pass
    path.unlink()
    with pytest.raises(ModelLoadError, match="No such file"), a_store(path):
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"pools": [1] * LAYERS},  # IndexError
        {"slots": [1 << 40]},  # TypeError
        {"stream_bytes": 1},  # ValueError
    ],
)
def test_what_cannot_be_is_one_kind_of_error(path: Path, wrong: dict[str, list[int]]) -> None:
    right = {"experts": EXPERTS, "pools": [0] * LAYERS, "slots": [1], "stream_bytes": 1 << 20}
    with pytest.raises(ModelLoadError, match=r"^the experts cannot be paged: .+$"):
        ExpertStore(slices(), [path], **(right | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [MemoryError, OverflowError, OSError])
def test_so_is_what_there_is_no_memory_for(path: Path, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise kind

    monkeypatch.setattr(_kernels, "ExpertStore", fail)
    with pytest.raises(ModelLoadError, match=rf"^the experts cannot be paged: {kind.__name__}$"), a_store(path):
        pass


def test_a_store_is_closed_while_it_reads(path: Path) -> None:
    for _ in range(20):
        with a_store(path) as store:
            store.prefetch(0, [0, 1, 2])
    with pytest.raises(ModelLoadError, match="closed"):
        store.stats  # noqa: B018
