"""The buffer of what a target wrote: real files, damaged ones too, several writers."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.speculative.buffer import AnswerBuffer, Record

PRINT, OTHER = bytes(32), bytes([1] * 32)
TOKEN = st.integers(0, 2**32 - 1)
ANSWERS = st.lists(st.tuples(st.lists(TOKEN, max_size=40), st.lists(TOKEN, min_size=1, max_size=40)), max_size=12)


def buffer(folder: Path, **options: int) -> AnswerBuffer:
    return AnswerBuffer(folder / "private" / "answers", PRINT, **options)


@given(ANSWERS)
@settings(max_examples=50, deadline=None)
def test_what_was_appended_is_read(tmp_path_factory: pytest.TempPathFactory, answers: list) -> None:
    folder = tmp_path_factory.mktemp("buffer")
    mine, expected = buffer(folder, prompt_tokens=8), []
    for number, (prompt, answer) in enumerate(answers):
        if number % 3 == 2:  # after a restart
            mine = buffer(folder, prompt_tokens=8)
        mine.append(prompt, answer)
        expected.append(Record(tuple(prompt[-8:]), tuple(answer)))
    assert buffer(folder).read() == expected


@given(ANSWERS.filter(bool), st.data())
@settings(max_examples=100, deadline=None)
def test_a_torn_record_is_dropped(tmp_path_factory: pytest.TempPathFactory, answers: list, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("buffer")
    mine, ends = buffer(folder), [48]
    for prompt, answer in answers:
        mine.append(prompt, answer)
        ends.append(mine.path.stat().st_size)
    whole = mine.read()
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(mine.path, cut)
    left = whole[: sum(end <= cut for end in ends[1:])] if cut >= 48 else []
    for reader in (mine, buffer(folder)):
        assert reader.read() == left
    mine.append([7], [8, 9])
    assert buffer(folder).read() == [*left, Record((7,), (8, 9))]


@given(ANSWERS.filter(bool), st.data())
@settings(max_examples=100, deadline=None)
def test_what_precedes_a_damaged_byte_stays(
    tmp_path_factory: pytest.TempPathFactory, answers: list, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("buffer")
    mine, ends = buffer(folder), [48]
    for prompt, answer in answers:
        mine.append(prompt, answer)
        ends.append(mine.path.stat().st_size)
    whole, raw = mine.read(), bytearray(mine.path.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    mine.path.write_bytes(raw)
    left = whole[: sum(end <= place for end in ends[1:])] if place >= 48 else []
    fresh = buffer(folder)
    assert fresh.read() == left
    fresh.append([], [5])
    assert buffer(folder).read() == [*left, Record((), (5,))]


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_file_can_be_read(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    folder = tmp_path_factory.mktemp("buffer")
    mine = buffer(folder)
    mine.append([], [1])
    for raw in (junk, mine.path.read_bytes()[:48] + junk):
        mine.path.write_bytes(raw)
        fresh = buffer(folder)
        assert all(record.answer for record in fresh.read())


def test_the_oldest_go_and_the_size_is_kept(tmp_path: Path) -> None:
    mine = buffer(tmp_path, max_bytes=4096)
    for number in range(500):
        mine.append([number] * (number % 7), [number] * (1 + number % 30))
        assert mine.path.stat().st_size <= 4096
    answers = [record.answer[0] for record in mine.read()]
    assert answers == list(range(500 - len(answers), 500))
    assert mine.path.stat().st_size > 2048
    assert [path.name for path in mine.path.parent.iterdir()] == ["answers"]


def test_an_answer_larger_than_the_buffer_is_cut(tmp_path: Path) -> None:
    mine = buffer(tmp_path, max_bytes=1024)
    mine.append(range(300), range(5000))
    (record,) = mine.read()
    assert record.answer == tuple(range(len(record.answer)))
    assert 200 < len(record.answer) < 256
    assert mine.path.stat().st_size <= 1024
    mine.append([1], [2])
    assert mine.read()[-1] == Record((1,), (2,))


def test_it_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        mine = buffer(tmp_path, max_bytes=1024)
        for _ in range(40):
            mine.append([1], [2] * 30)
    finally:
        os.umask(before)
    assert stat.S_IMODE(mine.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(mine.path.parent.stat().st_mode) == 0o700
    mine.path.chmod(0o644)  # by someone
    fresh = buffer(tmp_path)
    fresh.append([1], [2])
    assert stat.S_IMODE(mine.path.stat().st_mode) == 0o600


def test_it_can_be_deleted(tmp_path: Path) -> None:
    mine = buffer(tmp_path)
    assert mine.read() == []
    mine.clear()
    mine.append([1], [2])
    mine.clear()
    assert not mine.path.exists()
    assert mine.read() == []
    mine.append([3], [4])
    other = buffer(tmp_path)
    other.path.unlink()
    other.path.parent.rmdir()  # drafting has been told to forget
    mine.append([5], [6])
    assert mine.read() == [Record((5,), (6,))]


def test_records_of_another_vocabulary_count_for_nothing(tmp_path: Path) -> None:
    mine = buffer(tmp_path)
    mine.append([1], [2])
    other = AnswerBuffer(mine.path, OTHER)
    assert other.read() == []
    other.append([3], [4])
    assert mine.read() == []
    assert other.read() == [Record((3,), (4,))]


def test_no_answer_is_no_record_and_no_token_no_answer(tmp_path: Path) -> None:
    mine = buffer(tmp_path)
    mine.append([1, 2], [])
    assert not mine.path.exists()
    for wrong in ([-1], [1 << 32], ["a"], [1.5]):
        with pytest.raises(ValueError, match="whole numbers"):
            mine.append([], wrong)
    with pytest.raises(ValueError, match="fingerprint"):
        AnswerBuffer(mine.path, b"")


def test_threads_and_processes_write_whole_records(tmp_path: Path) -> None:
    mine = buffer(tmp_path, max_bytes=20_000)
    code = (
        "import sys; from pathlib import Path; from edgellm.speculative.buffer import AnswerBuffer\n"
        f"buffer = AnswerBuffer(Path({str(mine.path)!r}), bytes(32), max_bytes=20_000)\n"
        "for number in range(300): buffer.append([9], [int(sys.argv[1]), number] * 5)\n"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(name)]) for name in (1, 2)]

    def write(name: int) -> None:
        for number in range(300):
            mine.append([9], [name, number] * 5)

    threads = [threading.Thread(target=write, args=(name,)) for name in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait() for other in others] == [0, 0]
    found = mine.read()
    assert len(found) > 200
    for name in (1, 2, 3, 4):
        numbers = [record.answer[1] for record in found if record.answer[0] == name]
        assert numbers == list(range(numbers[0], 300)) if numbers else True
    assert all(record.answer == record.answer[:2] * 5 for record in found)


def test_a_file_that_is_replaced_meanwhile_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, lock = buffer(tmp_path), fcntl.flock
    mine.append([1], [2])
    spare = AnswerBuffer(tmp_path / "spare" / "answers", PRINT)
    spare.append([3], [4])

    def late(descriptor: int, how: int) -> None:  # another process was first, and renewed the file
        if spare.path.exists():
            spare.path.replace(mine.path)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    mine.append([5], [6])
    assert mine.read() == [Record((3,), (4,)), Record((5,), (6,))]
