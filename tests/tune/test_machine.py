"""Whether the machine is at rest, by the processors' time that others take."""

from __future__ import annotations

import pytest

from edgellm.tune import machine
from edgellm.tune.machine import MachineRest, others_cpu_s


class Machine:
    """A clock, and processors that others use."""

    def __init__(self, processors: int) -> None:
        self.now_s = 100.0
        self.others_s: float | None = 7.0
        self.rest = MachineRest(others_s=lambda: self.others_s, clock_s=lambda: self.now_s, processors=processors)

    def pass_by(self, seconds: float, busy: float) -> bool:
        assert self.others_s is not None
        self.now_s += seconds
        self.others_s += busy * seconds
        return self.rest.look()


def test_one_look_says_nothing() -> None:
    assert not Machine(2).rest.look()


@pytest.mark.parametrize(("processors", "busy", "at_rest"), [(2, 0.4, True), (2, 0.6, False), (8, 1.9, True)])
def test_others_may_use_a_quarter(processors: int, busy: float, at_rest: bool) -> None:
    found = Machine(processors)
    found.rest.look()
    assert found.pass_by(5, busy) is at_rest


def test_the_verdict_follows_what_happens() -> None:
    found = Machine(2)
    found.rest.look()
    assert [found.pass_by(5, busy) for busy in (0.0, 2.0, 0.1)] == [True, False, True]


def test_looks_in_quick_succession_get_the_last_verdict() -> None:
    found = Machine(2)
    found.rest.look()
    found.pass_by(5, 0.0)
    assert [found.pass_by(0.5, 2.0) for _ in range(3)] == [True] * 3
    assert not found.pass_by(0.5, 2.0), "what happened in between counts once enough time has passed"


def test_what_happened_long_ago_does_not_count() -> None:
    found = Machine(2)
    found.rest.look()
    assert not found.pass_by(600, 0.0)
    assert found.pass_by(5, 0.0)


def test_where_the_system_does_not_tell_it_is_at_rest(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(machine, "_STAT", tmp_path / "none")
    assert others_cpu_s() is None
    assert MachineRest().look()


def test_what_has_low_priority_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(machine, "_STAT", stat)
    monkeypatch.setattr(machine.time, "process_time", lambda: 1.0)
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    stat.write_text("cpu  200 9999 100 5 6 50 50 7 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n")
    assert others_cpu_s() == pytest.approx(3.0)
