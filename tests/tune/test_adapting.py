"""Who adapts drafters, and when: with a program in the trainer's place, whose words are fixed."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edgellm.speculative.buffer import AnswerBuffer, Record
from edgellm.speculative.places import merged_path
from edgellm.tune import adapting as adapting_module
from edgellm.tune.adaptation import parse
from edgellm.tune.adapted import Adapted, mark, read_adapted, write_adapted
from edgellm.tune.adapting import LOCK, Adapting, Pair, told
from edgellm.tune.ownership import Ownership
from tests.serving.server import wait_until

MARK = bytes(32)
HEAD = """
import json, os, pathlib, sys, time
def tell(event, **facts): print(json.dumps({"event": event, **facts}), flush=True)
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
output = pathlib.Path(options["--output"])
with (output.parent / "runs").open("a") as runs: runs.write(json.dumps(options) + "\\n")
tell("begun", steps=2)
"""
RESULT = """
tell("done", accepted={accepted}, acceptance_without=0.4, acceptance_before=0.5, acceptance_after=0.625, seconds=2.0,
     cpu_seconds=3.0, peak_rss_bytes=1000)
"""
BETTER = HEAD + 'output.write_text("adapter")' + RESULT.format(accepted=True)
NO_BETTER = HEAD + RESULT.format(accepted=False)
ENDLESS = HEAD + 'while True:\n    tell("step", step=1)\n    time.sleep(0.005)\n'
LOST = HEAD + "sys.exit(3)"
UNSOUND = HEAD + """
if "--from" in options:
    tell("failed", code="adapter_unsound", message="it is of another model")
    sys.exit(1)
output.write_text("adapter")
""" + RESULT.format(accepted=True)  # fmt: skip


@dataclass
class Rig:
    """A model and a drafter that are files with nothing in them, and one supervisor."""

    home: Path
    idle: bool = True
    alone: bool = True
    taken: list[Path] = field(default_factory=list)
    adapting: Adapting | None = None

    def __post_init__(self) -> None:
        folder = self.home / "speculative" / "target"
        folder.mkdir(parents=True)
        self.answers = AnswerBuffer(folder / "answers", MARK)
        for name in ("target", "drafter"):
            (self.home / f"{name}.gguf").touch()
        self.pair = Pair(
            "target",
            self.home / "target.gguf",
            self.home / "drafter.gguf",
            self.answers,
            folder / "adapter.gguf",
            self.taken.append,
        )
        self.said = 0

    def answer(self, count: int) -> None:
        for _ in range(count):
            self.answers.append([1], [2, self.said])
            self.said += 1

    def start(self, source: str, **options: object) -> Adapting:
        self.adapting = Adapting(
            self.home,
            lambda: [self.pair],
            idle=lambda: self.idle,
            alone=lambda: self.alone,
            command=(sys.executable, "-c", source),
            answers_new=4,
            **options,  # type: ignore[arg-type]
        )
        self.adapting.start()
        return self.adapting

    @property
    def runs(self) -> list[dict[str, str]]:
        path = self.pair.adapter.parent / "runs"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def figures(self) -> Adapted:
        return read_adapted(self.pair.figures)

    def tried(self, count: int) -> Callable[[], bool]:
        return lambda: self.figures.taken + self.figures.dropped + self.figures.failed == count


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(adapting_module, "_POLL_S", 0.01)
    found = Rig(tmp_path)
    yield found
    if found.adapting is not None:
        found.adapting.close()


def looked(adapting: Adapting, times: int = 3) -> None:
    """Returns once it has looked so many times whether there is anything to do."""
    turns = threading.Semaphore(0)
    before = adapting._turn

    def turn() -> bool:
        found = before()
        turns.release()
        return found

    adapting._turn = turn  # type: ignore[method-assign]
    for _ in range(times):
        assert turns.acquire(timeout=30)


def stopping(adapting: Adapting) -> bool:
    process = adapting._slot._process
    return process is not None and process._stopping


def test_a_better_adapter_is_taken_and_the_next_one_starts_from_it(rig: Rig) -> None:
    rig.answer(4)
    adapting = rig.start(BETTER)
    wait_until(rig.tried(1), "an adaptation")
    wait_until(lambda: bool(rig.taken), "it is taken")
    looked(adapting)
    assert len(rig.runs) == 1  # nothing new has been said
    rig.answer(4)
    wait_until(rig.tried(2), "another adaptation")
    wait_until(lambda: len(rig.taken) == 2, "it is taken")
    assert rig.taken == [merged_path(rig.pair.adapter)] * 2
    assert [run.get("--from") for run in rig.runs] == [None, str(rig.pair.adapter)]
    found = rig.figures
    assert (found.taken, found.dropped, found.cpu_seconds, found.peak_rss_bytes) == (2, 0, 6.0, 1000)
    assert (found.acceptance_without, found.acceptance_before, found.acceptance_after) == (0.4, 0.5, 0.625)


def test_the_process_is_told_what_it_understands(rig: Rig) -> None:
    rig.answer(4)
    rig.start(BETTER, threads=3)
    wait_until(rig.tried(1), "an adaptation")
    (run,) = rig.runs
    spec = parse([part for option in run.items() for part in option])
    assert (spec.drafter, spec.target, spec.output) == (rig.pair.drafter, rig.pair.target, rig.pair.adapter)
    assert (spec.buffer, spec.threads, spec.top, spec.recompute) == (rig.answers.path, 3, 0, False)


def test_one_that_is_no_better_is_not_taken_nor_tried_again(rig: Rig) -> None:
    rig.answer(5)
    adapting = rig.start(NO_BETTER)
    wait_until(rig.tried(1), "an adaptation")
    looked(adapting)
    assert (len(rig.runs), rig.taken, rig.figures.dropped) == (1, [], 1)
    assert rig.figures.acceptance_after == 0.5  # that in use


def test_few_answers_are_waited_for(rig: Rig) -> None:
    rig.answer(3)
    adapting = rig.start(BETTER)
    looked(adapting)
    assert not rig.runs
    rig.answer(1)
    wait_until(rig.tried(1), "an adaptation")


@pytest.mark.parametrize("busy", ["idle", "alone"])
def test_it_waits_for_others(rig: Rig, busy: str) -> None:
    setattr(rig, busy, False)
    rig.answer(4)
    adapting = rig.start(BETTER)
    looked(adapting)
    assert not rig.runs
    setattr(rig, busy, True)
    wait_until(rig.tried(1), "an adaptation")


def test_a_job_ends_it_and_a_request_does_not(rig: Rig) -> None:
    rig.answer(4)
    adapting = rig.start(ENDLESS)
    wait_until(lambda: adapting.running == "target", "it runs")
    rig.idle = False  # as while a request runs
    adapting.give_way()
    adapting.go_on()
    assert adapting.running == "target"
    rig.alone = False
    # The program does not listen, so it is killed here where the real one ends by itself.
    wait_until(lambda: stopping(adapting), "it is told to end")
    adapting.hold()
    adapting.release()
    assert rig.figures == Adapted()  # these answers are still to be learned from


def test_a_failure_is_not_repeated_until_there_is_more(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.answer(4)
    adapting = rig.start(LOST)
    wait_until(rig.tried(1), "an attempt")
    looked(adapting)
    assert (rig.figures.failed, len(rig.runs)) == (1, 1)
    assert "ended with status 3" in caplog.text
    rig.answer(4)
    wait_until(rig.tried(2), "another attempt")


def test_an_adapter_that_cannot_be_trained_further_is_given_up(rig: Rig) -> None:
    rig.pair.adapter.write_text("of another drafter")
    rig.answer(4)
    rig.start(UNSOUND)
    wait_until(rig.tried(1), "an adaptation")
    wait_until(lambda: len(rig.taken) == 2, "it is taken")
    assert rig.taken == [rig.pair.drafter, merged_path(rig.pair.adapter)]
    assert ["--from" in run for run in rig.runs] == [True, False]


def test_nothing_is_read_or_written_while_it_is_held(rig: Rig) -> None:
    rig.answer(4)
    adapting = rig.start(ENDLESS)
    wait_until(lambda: len(rig.runs) == 1, "it runs")
    adapting.hold()
    assert adapting.running == ""
    looked(adapting)
    assert len(rig.runs) == 1
    adapting.release()
    wait_until(lambda: len(rig.runs) == 2, "it runs again")


def test_it_can_be_held_while_it_is_halted(rig: Rig) -> None:
    rig.answer(4)
    adapting = rig.start(ENDLESS)
    wait_until(lambda: len(rig.runs) == 1, "it runs")
    adapting.give_way()
    adapting.hold()
    assert adapting.running == ""
    adapting.close()


def test_only_one_of_a_state_directory_adapts(rig: Rig) -> None:
    other = Ownership(rig.home, LOCK)
    assert other.acquire()
    rig.answer(4)
    adapting = rig.start(BETTER)
    looked(adapting)
    assert not rig.runs
    other.release()
    wait_until(rig.tried(1), "an adaptation")


def test_without_memory_it_does_not_begin(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapting_module, "available_memory_bytes", lambda: 300 << 20)
    rig.answer(4)
    adapting = rig.start(BETTER)
    looked(adapting)
    assert not rig.runs
    monkeypatch.setattr(adapting_module, "available_memory_bytes", lambda: 2 << 30)
    wait_until(rig.tried(1), "an adaptation")


def test_the_end_ends_it_at_once(rig: Rig) -> None:
    rig.answer(4)
    adapting = rig.start(ENDLESS)
    wait_until(lambda: len(rig.runs) == 1, "it runs")
    adapting.close()
    adapting.close()
    adapting.start()
    assert rig.figures == Adapted()


# --- what is kept of it -----------------------------------------------------------------------------------------------


def test_figures_come_back(tmp_path: Path) -> None:
    adapted = Adapted("ab", 1, 2, 3, 4.5, 6.5, 7, 0.1, 0.2, 0.3)
    write_adapted(tmp_path / "figures.json", adapted)
    assert read_adapted(tmp_path / "figures.json") == adapted
    assert read_adapted(tmp_path / "none.json") == Adapted()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1, "taken": "x"}', '{"version": 1, "more": 1}'])
def test_damaged_figures_count_for_nothing(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "figures.json").write_text(content)
    assert read_adapted(tmp_path / "figures.json") == Adapted()
    assert "is not used" in caplog.text


def test_fresh_answers_are_those_behind_the_newest_seen() -> None:
    records = [Record((number,), (number,)) for number in range(9)]
    assert Adapted().fresh(records) == 9
    assert Adapted(seen=mark(records[4])).fresh(records) == 4
    assert Adapted(seen=mark(records[8])).fresh(records) == 0
    assert Adapted(seen=mark(Record((), (77,)))).fresh(records) == 9  # it has been dropped from the buffer
    assert mark(Record((1,), (2, 3))) != mark(Record((1, 2), (3,)))


def test_what_came_of_it_is_told() -> None:
    assert (
        told(Adapted(acceptance_before=0.4, acceptance_after=0.5)) == "50.0% of its tokens are accepted, 40.0% before"
    )
    assert told(Adapted(acceptance_before=0.4, acceptance_after=0.4)).startswith("no gain")
    assert told(Adapted()) == "there was too little to learn from"
