"""What the training process does to itself, so that whatever else runs on the machine comes first."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import TextIO

CHILD = "EDGELLM_TUNE_CHILD"
"""Set to 1 by a parent that speaks to the process by its standard input."""

_NICE = 19
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_LARGE_BYTES = 1 << 20
_LOOK_S = 0.05
_RESERVE_BYTES = 512 << 20
_SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
_STATUS = Path("/proc/self/status")
_OOM_SCORE = Path("/proc/self/oom_score_adj")


def step_back() -> None:
    """Low priority, and the first to go when memory runs out. What the system refuses is left out."""
    with contextlib.suppress(OSError):
        os.nice(_NICE - os.nice(0))
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with contextlib.suppress(OSError):
        _OOM_SCORE.write_text("1000")
    if sys.platform.startswith("linux") and os.environ.get(CHILD) == "1":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)


def thrifty_allocation() -> None:
    """Large allocations go back to the system as soon as they are freed (glibc; elsewhere nothing changes).

    Otherwise freed tensors stay as gaps between others, up to as much again as is in use. It costs up to a third more
    time, for memory that comes back is cleared first.
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


class MemoryWatch:
    """Looks at the process's private memory many times a second, and holds it to a budget.

    Over the budget, `take_peak` says so. Far over it, allocations fail (Linux): the kernel counts what is reserved, of
    which libraries do not touch all, so its limit must be wider.
    """

    def __init__(self, budget_bytes: int | None) -> None:
        self._budget_bytes = budget_bytes
        self._peak = 0
        self._over = threading.Event()
        if budget_bytes is not None and sys.platform.startswith("linux"):
            untouched = max(0, _status_bytes("VmData") - private_bytes())
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (budget_bytes + untouched + _RESERVE_BYTES, hard))
        threading.Thread(target=self._look, name="edgellm-tune-memory", daemon=True).start()

    def take_peak(self) -> int:
        """The most bytes since the last call. Raises MemoryError if that is more than the budget."""
        peak = max(self._peak, private_bytes())
        self._peak = 0
        if self._budget_bytes is not None and peak > self._budget_bytes:
            raise MemoryError(f"{peak} bytes are more than the budget of {self._budget_bytes}")
        return peak

    def close(self) -> None:
        """Ends the looking. The limit stays."""
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            self._peak = max(self._peak, private_bytes())


def private_bytes() -> int:
    """Memory of this process alone that is resident; 0 where the system does not say."""
    return _status_bytes("RssAnon")


def _status_bytes(key: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)


def stop_wanted(source: TextIO) -> threading.Event:
    """An event that is set once the parent writes "stop", or has gone."""
    wanted = threading.Event()

    def listen() -> None:
        for line in source:
            if line.strip() == "stop":
                break
        wanted.set()

    threading.Thread(target=listen, name="edgellm-tune-stop", daemon=True).start()
    return wanted
