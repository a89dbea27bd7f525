"""Whether anybody waits for an answer, and who must give way then."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Protocol

QUIET_S = 0.3
"""How long no request must run before others go on: halting and continuing them costs caches."""


class Yielding(Protocol):
    """What runs while nobody waits."""

    def give_way(self) -> None:
        """Halt. Quick: it is called for every request."""

    def go_on(self) -> None:
        """Nobody waits any more."""


class Quiet:
    """Counts requests, on the event loop; `seconds` may be asked by any thread."""

    def __init__(self, yielding: Sequence[Yielding]) -> None:
        self._yielding = tuple(yielding)
        self._requests = 0
        self._timer: asyncio.TimerHandle | None = None
        self._since_s = time.monotonic()

    def request_begins(self) -> None:
        """All halt at once."""
        self._requests += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._requests == 1:
            for one in self._yielding:
                one.give_way()

    def request_ends(self) -> None:
        """A moment after the last one has ended, all go on."""
        self._requests -= 1
        if not self._requests:
            self._since_s = time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(QUIET_S, self._quiet)

    def _quiet(self) -> None:
        self._timer = None
        for one in self._yielding:
            one.go_on()

    @property
    def seconds(self) -> float:
        """Since the last request ended, or since the start; minus infinity while one runs."""
        return -math.inf if self._requests else time.monotonic() - self._since_s
