"""Answers on their way into buffers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgellm.speculative.buffer import ANSWER_TOKENS, PROMPT_TOKENS, AnswerBuffer, Record
from edgellm.speculative.collector import Collector

MARK = bytes(range(32))


@pytest.fixture
def buffer(tmp_path: Path) -> AnswerBuffer:
    return AnswerBuffer(tmp_path / "answers", MARK)


def test_answers_are_written_in_their_order(buffer: AnswerBuffer) -> None:
    collector = Collector()
    for number in range(20):
        collector.keep(buffer, [number, 1], [2, number])
    collector.settle()
    assert buffer.read() == [Record((number, 1), (2, number)) for number in range(20)]
    collector.close()
    collector.keep(buffer, [7], [7])
    collector.close()
    assert len(buffer.read()) == 20


def test_what_waits_is_written_before_it_closes(buffer: AnswerBuffer) -> None:
    collector = Collector()
    for number in range(20):
        collector.keep(buffer, [], [number])
    collector.close()
    assert len(buffer.read()) == 20


def test_long_ones_are_cut(buffer: AnswerBuffer) -> None:
    collector = Collector()
    collector.keep(buffer, range(PROMPT_TOKENS + 5), range(ANSWER_TOKENS + 5))
    collector.close()
    (record,) = buffer.read()
    assert record == Record(tuple(range(5, PROMPT_TOKENS + 5)), tuple(range(ANSWER_TOKENS)))


def test_what_was_kept_before_forgetting_is_not_written_after(buffer: AnswerBuffer) -> None:
    collector = Collector()
    collector.keep(buffer, [], [1])
    collector.settle()
    with collector.forgetting():
        collector.keep(buffer, [], [3])  # as a request that ends meanwhile does
        buffer.clear()
    collector.settle()
    assert buffer.read() == [Record((), (3,))]
    collector.close()


class Stuck(AnswerBuffer):
    """On a disk that takes no more, until it does."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, MARK)
        self.reached, self.free = threading.Event(), threading.Event()

    def append(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        self.reached.set()
        self.free.wait()
        super().append(prompt, answer)


def test_a_slow_disk_costs_answers_and_no_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collector, buffer = Collector(), Stuck(tmp_path / "answers")
    for number in range(600):
        collector.keep(buffer, [], [number])
    assert buffer.reached.wait(30)
    buffer.free.set()
    collector.close()
    kept = [record.answer[0] for record in buffer.read()]
    assert 256 <= len(kept) < 600
    assert kept == sorted(set(kept))
    assert "too slow" in caplog.text


def test_a_disk_that_fails_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    collector = Collector()
    collector.keep(AnswerBuffer(tmp_path / "file" / "answers", MARK), [], [1])
    collector.keep(buffer := AnswerBuffer(tmp_path / "answers", MARK), [], [2])
    collector.close()
    assert "not kept" in caplog.text
    assert len(buffer.read()) == 1
