"""The trainer's process: real processes, with programs in the trainer's place where what it says must be fixed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgellm.errors import StorageError
from edgellm.tune import process as process_module
from edgellm.tune.process import TrainerProcess, torch_missing
from tests.serving.server import wait_until

HEAD = """
import json, os, signal, sys, time
def tell(event, **facts): print(json.dumps({"event": event, **facts}), flush=True)
spec = json.loads(sys.argv[1])
"""
TICK = HEAD + 'step = 0\nwhile True:\n    step += 1\n    tell("step", step=step)\n    time.sleep(0.005)\n'
OBEY = (
    HEAD
    + """
tell("begun", steps=3)
said = sys.stdin.readline()
tell("stopped", step=1, said=said)
"""
)


class Run:
    """A program in the trainer's place, and the events that it has told so far."""

    def __init__(self, source: str, **options: Any) -> None:
        self.events: list[dict[str, Any]] = []
        command = (sys.executable, "-c", source)
        self.process = TrainerProcess({"model": "m"}, self.events.append, command=command, **options)
        self.outcome: process_module.Outcome | None = None
        self._thread = threading.Thread(target=self._wait)

    def _wait(self) -> None:
        self.outcome = self.process.wait()

    def start(self) -> Run:
        self._thread.start()
        return self

    def end(self) -> process_module.Outcome:
        self._thread.join(30)
        assert self.outcome is not None
        return self.outcome

    def close(self) -> None:
        self.process.__exit__()
        if self._thread.ident:
            self._thread.join(30)


@pytest.fixture
def program() -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(source: str, **options: Any) -> Run:
        runs.append(Run(source, **options))
        return runs[-1].start()

    yield make
    for run in runs:
        run.close()


def state(pid: int) -> str:
    """The letter that Linux has for it: T stopped, S asleep, R running."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_events_come_in_order_and_the_last_says_how_it_ended(program: Callable[..., Run]) -> None:
    run = program(HEAD + 'tell("begun", model=spec["model"])\nprint("noise")\ntell("done", adapter="a.gguf")')
    outcome = run.end()
    assert run.events == [{"event": "begun", "model": "m"}, {"event": "done", "adapter": "a.gguf"}]
    assert (outcome.kind, outcome.event["adapter"], outcome.signal, outcome.out_of_memory) == (
        "done",
        "a.gguf",
        None,
        False,
    )
    assert run.process.wait() is outcome
    for harmless in (run.process.stop, run.process.give_way, run.process.go_on, run.process.kill):
        harmless()


def test_it_is_told_that_it_is_a_child_in_a_group_of_its_own(program: Callable[..., Run]) -> None:
    run = program(HEAD + 'tell("begun", child=os.environ["EDGELLM_TUNE_CHILD"], group=os.getpgrp())\ntell("done")')
    run.end()
    assert run.events[0] == {"event": "begun", "child": "1", "group": run.process.pid}


def test_failed_carries_what_is_at_fault(program: Callable[..., Run]) -> None:
    told = 'tell("failed", code="invalid_training_file", message="m", param="validation_file", faults=[[3, "x"]])'
    outcome = program(HEAD + told + "\nsys.exit(1)").end()
    assert (outcome.kind, outcome.code, outcome.message) == ("failed", "invalid_training_file", "m")
    assert (outcome.param, outcome.faults) == ("validation_file", ((3, "x"),))
    assert program(HEAD + 'tell("failed", code="out_of_memory")\nsys.exit(1)').end().out_of_memory


def test_death_without_a_word_is_told_by_its_last_line(program: Callable[..., Run], tmp_path: Path) -> None:
    log = tmp_path / "log"
    outcome = program('import sys\nprint("one", file=sys.stderr)\nsys.exit("the end")', log=log).end()
    assert (outcome.kind, outcome.message) == ("died", "the trainer ended with status 1: the end")
    assert log.read_text() == "one\nthe end\n"
    assert log.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StorageError, match="cannot be started"):
        Run(TICK, log=tmp_path / "no" / "log")


def test_killed_by_another(program: Callable[..., Run]) -> None:
    run = program(TICK)
    wait_until(lambda: run.events, "its first event")
    os.kill(run.process.pid, signal.SIGKILL)
    outcome = run.end()
    assert (outcome.kind, outcome.signal, outcome.code) == ("died", 9, "server_error")
    assert outcome.message == "the trainer was killed by signal 9"


def test_a_kill_while_the_kernel_wants_memory(program: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    counter = [{"/proc/vmstat": "1"}]
    monkeypatch.setattr(process_module, "_oom_kills", lambda: counter[-1])
    mine, others = program(TICK), program(TICK)
    counter.append({"/proc/vmstat": "2"})
    os.kill(others.process.pid, signal.SIGKILL)
    mine.process.kill()
    assert (others.end().out_of_memory, others.end().code) == (True, "out_of_memory")
    assert not mine.end().out_of_memory


def test_the_kernels_counters_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events").write_text("low 0\noom 3\noom_kill 2\n")
    monkeypatch.setattr(process_module, "_oom_counters", lambda: [tmp_path / "events", tmp_path / "none"])
    assert process_module._oom_kills() == {str(tmp_path / "events"): "2"}


def test_stop_is_asked_for(program: Callable[..., Run]) -> None:
    run = program(OBEY)
    run.process.stop()
    assert (run.end().kind, run.end().event["said"]) == ("stopped", "stop\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_giving_way(program: Callable[..., Run]) -> None:
    run = program(TICK)
    wait_until(lambda: run.events, "its first event")
    for _ in range(2):
        run.process.give_way()
        wait_until(lambda: state(run.process.pid) == "T", "it halts")
    for _ in range(2):
        run.process.go_on()
        wait_until(lambda: state(run.process.pid) != "T", "it runs")
    seen = len(run.events)
    wait_until(lambda: len(run.events) > seen, "another event")


def test_one_that_gives_way_can_be_stopped_and_killed(program: Callable[..., Run]) -> None:
    obeys, ticks = program(OBEY), program(TICK)
    for run in (obeys, ticks):
        wait_until(lambda run=run: run.events, "its first event")
        run.process.give_way()
    obeys.process.stop()
    obeys.process.give_way()
    assert obeys.end().kind == "stopped"
    ticks.process.kill()
    assert (ticks.end().kind, ticks.end().signal) == ("died", 9)


def test_a_helper_that_outlives_it_holds_nothing_up(program: Callable[..., Run]) -> None:
    source = HEAD + 'import subprocess\nsubprocess.Popen(["sleep", "5"])\ntell("done")\n'
    assert program(source).end().kind == "done"


def test_an_error_of_the_listener_is_its_callers() -> None:
    def refuse(event: dict[str, Any]) -> None:
        raise KeyError(event["event"])

    command = (sys.executable, "-c", HEAD + 'tell("begun")\ntell("done")')
    with TrainerProcess({}, refuse, command=command) as process:
        for event in ("begun", "done"):
            with pytest.raises(KeyError, match=event):
                process.wait()
        assert process.wait().kind == "done"


def test_torch_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module.importlib.util, "find_spec", lambda name: None)
    assert torch_missing()
    monkeypatch.setattr(process_module.importlib.util, "find_spec", lambda name: name)
    assert not torch_missing()
