"""The servers under test: starting and stopping them, and what the kernel says about their processes (Linux only)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.client import BenchError

_CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PORT = "{port}"
_MODEL = "{model}"


@dataclass(frozen=True)
class Contender:
    """How to start one of the servers. `{port}` and `{model}` in its command are filled in."""

    name: str
    command: tuple[str, ...]

    def command_line(self, model: Path, port: int) -> list[str]:
        """The command with port and model filled in."""
        return [part.replace(_PORT, str(port)).replace(_MODEL, str(model)) for part in self.command]


@dataclass(frozen=True)
class Limits:
    """What both servers are given alike."""

    threads: int
    slots: int
    context_tokens: int  # KV cells, shared by all slots


def edgellm(command: list[str], limits: Limits, extra: list[str]) -> Contender:
    """edgellm with its defaults, but for the limits, and that its guard only annotates: a refusal is no answer to time.
    `extra` may say otherwise."""
    options = ["--guard", "annotate", "--threads", str(limits.threads), "--parallel", str(limits.slots)]
    options += ["--context-tokens", str(limits.context_tokens)]
    return Contender("edgellm", (*command, "serve", "--model", _MODEL, "--port", _PORT, *options, *extra))


def llama_server(binary: Path, limits: Limits, extra: list[str]) -> Contender:
    """llama-server with its defaults, but for the limits.

    --kv-unified lets its slots share the cells, as they do by default when their number is left to it; without it a
    slot gets an eighth of the context, which is less than the longest prompt here.
    """
    options = ["-t", str(limits.threads), "-np", str(limits.slots), "-c", str(limits.context_tokens), "--kv-unified"]
    return Contender(
        "llama-server", (str(binary), "-m", _MODEL, "--host", "127.0.0.1", "--port", _PORT, *options, *extra)
    )


@dataclass(frozen=True)
class Memory:
    """Of a process and all its descendants, in bytes. Pages of the mapped model file count in both."""

    rss_bytes: int
    peak_rss_bytes: int  # sum of each process's own peak
    pss_bytes: int  # shared pages divided among those that share them


class RunningServer:
    """A started server process."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, started_s: float) -> None:
        self._process = process
        self.port = port
        self.log = log
        self.started_s = started_s  # time.perf_counter() just before it was started

    def check_alive(self) -> None:
        """Raises BenchError with the end of its log if it has exited."""
        if self._process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-3000:]
            raise BenchError(f"the server exited with {self._process.returncode}; the end of its log:\n{tail}")

    def cpu_s(self) -> float:
        """Processor seconds used so far, children included."""
        return sum(_cpu_s(pid) for pid in _family(self._process.pid))

    def memory(self) -> Memory:
        """Memory in use now, children included."""
        family = _family(self._process.pid)
        rss = sum(_field_bytes(f"/proc/{pid}/status", "VmRSS:") for pid in family)
        peak = sum(_field_bytes(f"/proc/{pid}/status", "VmHWM:") for pid in family)
        pss = sum(_field_bytes(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in family)
        return Memory(rss, peak, pss)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to what is left of it after 20 seconds."""
        family = _family(self._process.pid)
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            for pid in family:
                _kill(pid)
            self._process.wait()


@contextmanager
def running(contender: Contender, model: Path) -> Iterator[RunningServer]:
    """The server, started on a free loopback port with an empty home of its own; stopped on the way out."""
    port = _free_port()
    command = contender.command_line(model, port)
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as scratch:
        # Neither server may pick up settings from the environment of whoever runs this.
        mine = ("EDGELLM_", "LLAMA_ARG_", "GGML_", "OMP_", "GOMP_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
        log = Path(scratch) / "log"
        with log.open("wb") as sink:
            started_s = time.perf_counter()
            try:
                process = subprocess.Popen(
                    command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, env={**clean, "EDGELLM_HOME": scratch}
                )
            except OSError as error:
                raise BenchError(f"cannot start {command[0]}: {error.strerror}") from None
        server = RunningServer(process, port, log, started_s)
        try:
            yield server
        finally:
            server.stop()


def machine_cpu_s() -> float:
    """Processor seconds used since boot by everything on this machine, time stolen by a hypervisor included."""
    user, nice, system, _, _, irq, softirq, steal = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / _CLOCK_TICKS_PER_S


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat after the command name, which may hold spaces; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _family(root: int) -> list[int]:
    """`root` and its descendants."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat_fields(int(entry))):
            parents[int(entry)] = int(fields[1])
    family = [root]
    for pid in family:  # grows while it is walked
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def _cpu_s(pid: int) -> float:
    # utime, stime, and the same of children that have exited and been waited for
    return sum(int(ticks) for ticks in _stat_fields(pid)[11:15]) / _CLOCK_TICKS_PER_S


def _field_bytes(path: str, field: str) -> int:
    """A `Name:   123 kB` line of a /proc file, in bytes; 0 if it is not there."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0
