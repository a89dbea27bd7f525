"""A process that ends at once when it is told to, with nothing half-written left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_STOPS = (signal.SIGTERM, signal.SIGINT)


class GivingWay:
    """Waits for SIGTERM or SIGINT on a thread of its own: whatever native code the others are in does not matter.

    Make it before any other thread is there: they all inherit that these signals are not for them.
    """

    def __init__(self, last_words: Callable[[], None]) -> None:
        """`last_words` is called before the process ends, with status 0."""
        self._last_words = last_words
        self._writing = threading.Lock()
        self._ending = threading.Lock()
        self._folder: Path | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        threading.Thread(target=self._wait, name="edgellm-tune-way", daemon=True).start()

    def when(self, wanted: threading.Event) -> None:
        """Ends the process as well once `wanted` is set."""

        def wait() -> None:
            wanted.wait()
            self._end()

        threading.Thread(target=wait, name="edgellm-tune-way-wanted", daemon=True).start()

    @contextlib.contextmanager
    def folder(self, path: Path) -> Iterator[Path]:
        """A new private folder, without what an earlier process has left of it; deleted at the end, whatever ends it.

        Raises OSError.
        """
        with self._writing:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True, mode=0o700)
            self._folder = path
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            self._folder = None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Until the end of this, which must be short, the process is not ended."""
        with self._writing:
            yield

    def settle(self) -> None:
        """The process is about to end by itself: it is no longer ended before. Idempotent."""
        self._writing.acquire(blocking=False)

    def _wait(self) -> None:
        signal.sigwait(_STOPS)
        self._end()

    def _end(self) -> None:
        self._ending.acquire()
        self._writing.acquire()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._last_words()
        os._exit(0)
