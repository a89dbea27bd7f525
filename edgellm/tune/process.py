"""The trainer as a process of its own: started, listened to, made to give way, stopped, and told how it ended.

The process is `python -m edgellm.tune SPEC`, in a process group of its own, so that Ctrl-C in a terminal reaches only
who started it. It takes the line "stop" on its standard input, and the end of that input for the same. What happens
comes as JSON, one object a line, each with an "event". Needs no torch here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol, Self

from edgellm.errors import StorageError
from edgellm.tune.own_process import CHILD

TRAINER = (sys.executable, "-P", "-m", "edgellm.tune")  # -P: the working directory's modules are not ours
_TAIL_LINES = 40
_LOG_BYTES_MAX = 1 << 20
_POLL_S = 0.02
_SILENCE_S = 1.0
_ENDINGS: dict[str, Literal["done", "stopped", "failed"]] = {"done": "done", "stopped": "stopped", "failed": "failed"}

OnEvent = Callable[[dict[str, Any]], None]


class Spec(Protocol):
    """An order that can be written as JSON: RunSpec."""

    def to_json(self) -> str:
        """One JSON object."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. "died": without a word of its own, so `message` says how.

    `faults` are (line, text) of a training file that cannot be used; `event` is the last one's content.
    """

    kind: Literal["done", "stopped", "failed", "died"]
    code: str = ""
    message: str = ""
    param: str | None = None
    faults: tuple[tuple[int, str], ...] = ()
    signal: int | None = None  # that ended it
    out_of_memory: bool = False
    event: Mapping[str, Any] = field(default_factory=dict)


def torch_missing() -> bool:
    """Whether there is no torch to train with. It is not imported."""
    try:
        return importlib.util.find_spec("torch") is None
    except (ImportError, ValueError):
        return True


class TrainerProcess:
    """One trainer. Any thread may call its methods; only one waits.

    On Linux the trainer is killed when the thread that made this object ends, so that thread has to outlive it.
    """

    def __init__(
        self,
        spec: Mapping[str, Any] | Spec | None,
        on_event: OnEvent,
        *,
        log: Path | None = None,
        command: Sequence[str] = TRAINER,
    ) -> None:
        """`spec` becomes the last argument of `command`; None: that has all it needs. `on_event` is called within
        `wait`. `log` takes what the trainer writes to its standard error.

        Raises StorageError if the log cannot be written or no process can be made.
        """
        self._on_event = on_event
        self._lock = threading.Lock()  # held where the process is reaped or signalled, so no other is ever hit
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._last: dict[str, Any] = {}
        self.has_begun = False  # it takes steps, and will hear of a stop; before that, there is nothing to save
        self._paused = self._stopping = self._killed = False
        self._over: Outcome | None = None
        self._kills = _oom_kills()
        order = [] if spec is None else [json.dumps(dict(spec)) if isinstance(spec, Mapping) else spec.to_json()]
        try:
            self._log = None if log is None else os.fdopen(_private(log), "ab", buffering=0)
            self._process = subprocess.Popen(
                [*command, *order],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, CHILD: "1"},
                process_group=0,
                bufsize=0,
            )
        except OSError as error:
            raise StorageError(f"the trainer cannot be started: {error.strerror or error}") from None
        self._readers = [
            threading.Thread(target=reader, args=(stream,), name="edgellm-trainer", daemon=True)
            for reader, stream in (
                (self._read_events, self._process.stdout),
                (self._read_errors, self._process.stderr),
            )
        ]
        for thread in self._readers:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kills it if it has not ended."""
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._reap(10.0)

    @property
    def pid(self) -> int:
        """Its process id, which is its group's as well."""
        return self._process.pid

    # --- what it is told ------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask it to write a checkpoint and end; it then gives way no more. Idempotent, as all of these."""
        with self._lock:
            self._stopping = True
            self._continue()
        with contextlib.suppress(OSError, ValueError):  # it has ended, or its input is closed
            assert self._process.stdin is not None
            self._process.stdin.write(b"stop\n")

    def kill(self) -> None:
        """End it at once; what its last checkpoint holds is kept."""
        with self._lock:
            self._killed = self._stopping = True
            self._continue()
            self._signal(signal.SIGKILL)

    def give_way(self) -> None:
        """Halt it where it is, until `go_on`. Nothing happens once it was told to stop, or has ended."""
        with self._lock:
            if not self._paused and not self._stopping:
                self._paused = True
                self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        with self._lock:
            self._continue()

    def _continue(self) -> None:
        if self._paused:
            self._paused = False
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        """To its whole group, for it has helpers. The lock is held."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    # --- what it says ---------------------------------------------------------------------------------------------

    def wait(self) -> Outcome:
        """Passes on each event until the process has ended, then says how it did.

        Raises what `on_event` raises; the process then goes on, and `wait` may be called again.
        """
        while self._over is None:
            line = self._next_line()
            if line is None:
                self._over = self._outcome(self._reap())
                break
            event = _event(line)
            if event is None:
                self._tail.append(_text(line))
            else:
                self._last = event
                self.has_begun = self.has_begun or event["event"] == "begun"
                self._on_event(event)
        return self._over

    def _next_line(self) -> bytes | None:
        """None at the end, also where a helper that outlives the trainer holds its output open."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._lines.get(timeout=_SILENCE_S)
            with self._lock:
                ended = self._process.poll() is not None
            if ended and self._lines.empty():
                return None

    def _read_events(self, stream: IO[bytes]) -> None:
        # The stream is not buffered: readline of a raw file would read byte by byte.
        held = b""
        while piece := stream.read(1 << 16):
            *lines, held = (held + piece).split(b"\n")
            for line in lines:
                self._lines.put(line)
        stream.close()
        if held:
            self._lines.put(held)
        self._lines.put(None)

    def _read_errors(self, stream: IO[bytes]) -> None:
        room = _LOG_BYTES_MAX
        held = b""
        while piece := stream.read(1 << 16):
            if self._log is not None:
                with contextlib.suppress(OSError):
                    self._log.write(piece[:room])
                room -= min(room, len(piece))
            *lines, held = (held + piece)[-_LOG_BYTES_MAX:].split(b"\n")
            self._tail.extend(_text(line) for line in lines)
        stream.close()
        if held:
            self._tail.append(_text(held))
        if self._log is not None:
            self._log.close()

    def _reap(self, timeout_s: float | None = None) -> int:
        """Its exit status, or minus the signal. Raises subprocess.TimeoutExpired."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                status = self._process.poll()
            if status is not None:
                break
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(self._process.args, timeout_s or 0.0)
            time.sleep(_POLL_S)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._readers[1].join(1.0)  # the last of its errors; a helper that outlives it may hold the pipe open
        return status

    def _outcome(self, status: int) -> Outcome:
        last = self._last
        kind = _ENDINGS.get(str(last.get("event")))
        if kind == "failed":
            return Outcome(
                "failed",
                code=str(last.get("code", "server_error")),
                message=str(last.get("message", "")),
                param=last.get("param"),
                faults=tuple((int(line), str(text)) for line, text in last.get("faults") or ()),
                out_of_memory=last.get("code") == "out_of_memory",
                event=last,
            )
        if kind is not None:  # what it said last is on the disk, however it ended then
            return Outcome(kind, event=last)
        number = -status if status < 0 else None
        killed = number == signal.SIGKILL and not self._killed
        return Outcome(
            "died",
            code="out_of_memory" if (lost := killed and _oom_kills() != self._kills) else "server_error",
            message=self._last_words(status, out_of_memory=lost),
            signal=number,
            out_of_memory=lost,
            event=last,
        )

    def _last_words(self, status: int, *, out_of_memory: bool) -> str:
        if out_of_memory:
            return "the trainer ran out of memory and was killed"
        how = f"the trainer was killed by signal {-status}" if status < 0 else f"the trainer ended with status {status}"
        said = [line for line in self._tail if line.strip()]
        return f"{how}: {said[-1].strip()}" if said and status != -signal.SIGKILL else how


def _event(line: bytes) -> dict[str, Any] | None:
    """None for what a library printed in between."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("event"), str) else None


def _text(line: bytes) -> str:
    return line.decode(errors="replace")[-2000:]


def _private(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _oom_kills() -> dict[str, str]:
    """How often the kernel has killed for want of memory, by where it says so; empty where it says nothing."""
    found = {}
    for path in _oom_counters():
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    found[str(path)] = count
    return found


def _oom_counters() -> list[Path]:
    root = Path("/sys/fs/cgroup")
    found = [Path("/proc/vmstat"), root / "memory.events", root / "memory/memory.oom_control"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if not controllers:
                found.append(root / place.strip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                found.append(root / "memory" / place.strip("/") / "memory.oom_control")
    return found
