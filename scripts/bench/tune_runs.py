"""A process that trains, watched: what it says of its steps and losses, and what the kernel says of its memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.client import BenchError
from bench.servers import machine_cpu_s

_SAMPLE_S = 0.1
_LOG_TAIL = 3000


@dataclass(frozen=True)
class Point:
    """A look at the validation rows. `seconds` of training came before it, looks at validation rows not counted."""

    seconds: float
    step: int
    loss: float
    accuracy: float


@dataclass
class Run:
    """One finished run. Times in seconds."""

    start_s: float = 0.0  # from the process's start to its first step, analysis included
    analysis_s: float = 0.0
    train_s: float = 0.0  # in steps
    wall_s: float = 0.0  # the life of the process
    step_s: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    parameters: int = 0
    peak_rss_bytes: int = 0
    training_peak_rss_bytes: int = 0  # from the first step on
    peak_private_bytes: int = 0  # anonymous memory alone: without the mapped model file
    disk_bytes: int = 0  # unnamed files that the process holds: ours keeps its prefix cache in one
    others_cores: float = 0.0  # that anything else on the machine kept busy meanwhile
    plan: dict[str, Any] = field(default_factory=dict)


class _Memory:
    """Samples /proc of a process until it ends."""

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")
        self._peaks = {"VmHWM:": 0, "RssAnon:": 0}
        self._before_reset = 0
        self._disk = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Takes a sample. The file system's view of the process may be gone already."""
        with self._lock, contextlib.suppress(OSError):
            for line in (self._proc / "status").read_text().splitlines():
                name = line.partition("\t")[0]
                if name in self._peaks:
                    self._peaks[name] = max(self._peaks[name], int(line.split()[1]) << 10)
            self._disk = max(self._disk, sum(self._unnamed_files()))

    def reset(self) -> None:
        """The kernel's peak begins anew, so that of the training is known apart from that of the loading."""
        self.look()
        with self._lock, contextlib.suppress(OSError):
            (self._proc / "clear_refs").write_text("5")
            self._before_reset = self._peaks["VmHWM:"]
            self._peaks["VmHWM:"] = 0

    def into(self, run: Run) -> None:
        self._over.set()
        self._thread.join()
        run.training_peak_rss_bytes = self._peaks["VmHWM:"]
        run.peak_rss_bytes = max(self._before_reset, run.training_peak_rss_bytes)
        run.peak_private_bytes = self._peaks["RssAnon:"]
        run.disk_bytes = self._disk

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            self.look()

    def _unnamed_files(self) -> Iterator[int]:
        """The disk of each."""
        for name in os.listdir(self._proc / "fd"):
            path = self._proc / "fd" / name
            with contextlib.suppress(OSError):
                target = os.readlink(path)
                if target.endswith(" (deleted)") and not target.startswith(("/memfd:", "/dev/shm/")):
                    yield path.stat().st_blocks * 512


def watch(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Run:
    """Runs a command to its end. Raises BenchError with its own words, or the end of its log, if it fails."""
    started, busy_s, ours_s = time.monotonic(), machine_cpu_s(), _own_cpu_s()
    run = Run()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=sink, stdin=subprocess.DEVNULL, env=dict(environment), text=True
        )
    memory = _Memory(process.pid)
    said = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            memory.look()
            if (event := _event(line)) is not None:
                said = str(event.get("message", "")) if event["event"] == "failed" else said
                _take(run, event, time.monotonic() - started, memory)
        status = process.wait()
    finally:
        process.kill()
        process.communicate()
        memory.into(run)
    if status:
        raise BenchError(said or f"{command[0]} ended with {status}:\n{log.read_text(errors='replace')[-_LOG_TAIL:]}")
    run.wall_s = time.monotonic() - started
    run.others_cores = max(0.0, machine_cpu_s() - busy_s - (_own_cpu_s() - ours_s)) / run.wall_s
    return run


def _own_cpu_s() -> float:
    """Of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _event(line: str) -> dict[str, Any] | None:
    """None for whatever else libraries print."""
    with contextlib.suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict) and "event" in event:
            return event
    return None


def _take(run: Run, event: dict[str, Any], now_s: float, memory: _Memory) -> None:
    match event["event"]:
        case "analysing":
            run.analysis_s = -now_s
        case "plan":
            run.plan = event
            run.parameters = event["parameters"]
            run.analysis_s += now_s if run.analysis_s else 0.0
        case "begun":
            run.start_s = now_s
            run.parameters = event.get("parameters", run.parameters)
            memory.reset()
        case "step":
            run.step_s.append(event["seconds"])
            run.train_s += event["seconds"]
        case "validation":
            run.points.append(Point(run.train_s, event["step"], event["loss"], event["accuracy"]))
