"""The process that trains just now, if there is one, while other threads halt it, let it go on, or end it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgellm.tune.process import TrainerProcess


class ProcessSlot:
    """Any thread may call its methods."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of both
        self._process: TrainerProcess | None = None
        self._yielding = False

    def give_way(self) -> None:
        """Halts the process, also one that comes later, until `go_on`. Quick: it is called for every request."""
        with self._lock:
            self._yielding = True
            if self._process is not None:
                self._process.give_way()

    def go_on(self) -> None:
        """The machine is the process's again."""
        with self._lock:
            self._yielding = False
            if self._process is not None:
                self._process.go_on()

    def tell(self, order: Callable[[TrainerProcess], None]) -> None:
        """Calls `order` with the process, if there is one. It must be quick."""
        with self._lock:
            if self._process is not None:
                order(self._process)

    @contextmanager
    def occupied(self, process: TrainerProcess) -> Iterator[None]:
        """While `process` is the one."""
        with self._lock:
            self._process = process
            if self._yielding:
                process.give_way()
        try:
            yield
        finally:
            with self._lock:
                self._process = None
