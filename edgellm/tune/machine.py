"""Whether the machine is at rest: whether other programs leave it to what may as well run later."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_BUSY_SHARE = 0.25  # of all processors that others may keep busy, on a machine that is at rest
_LEAST_S, _MOST_S = 2.0, 30.0  # between two looks, for what lies between to say something about now
_STAT = Path("/proc/stat")


class MachineRest:
    """Compares the processors' time from one look to the next: it wants to be asked every few seconds.

    What this process uses itself does not count, nor what runs at low priority. Where the system does not tell
    (anywhere but on Linux), the machine is at rest.
    """

    def __init__(
        self,
        *,
        others_s: Callable[[], float | None] | None = None,
        clock_s: Callable[[], float] = time.monotonic,
        processors: int | None = None,
    ) -> None:
        """`others_s`: processor seconds of others so far, None if they are not known."""
        self._others_s, self._clock_s = others_s or others_cpu_s, clock_s
        self._processors = processors or os.cpu_count() or 1
        self._last: tuple[float, float] | None = None  # time, seconds of others
        self._at_rest = False

    def look(self) -> bool:
        """Whether it has been at rest since the last look; False if there was none lately."""
        now, others = self._clock_s(), self._others_s()
        if others is None:
            return True
        if self._last is not None and now - self._last[0] < _LEAST_S:
            return self._at_rest
        last, self._last = self._last, (now, others)
        if last is None or now - last[0] > _MOST_S:
            self._at_rest = False
        else:
            busy = (others - last[1]) / (now - last[0])
            self._at_rest = busy <= _BUSY_SHARE * self._processors
        return self._at_rest


def others_cpu_s() -> float | None:
    """Processor seconds since the system's start of everything but this process, and but what has low priority."""
    try:
        user, _nice, system, _idle, _wait, irq, softirq = _STAT.read_text().split("\n", 1)[0].split()[1:8]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    return sum(map(int, (user, system, irq, softirq))) / ticks - time.process_time()
