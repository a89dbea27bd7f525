"""The guard at work: one thread judges what requests ask, beside the engine's, all of them by turns."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from edgellm.config import Settings
from edgellm.errors import ConfigError, ShuttingDownError
from guards import Guard, GuardError, RuleError, Rules, Turn, Verdict
from serving.guard_metrics import GuardMetrics

_log = logging.getLogger(__name__)

Judged = Verdict | None
"""What became of a judging; None: the guard failed, and its error is in the log."""


def let_go(result: asyncio.Future[Judged]) -> None:
    """Nobody waits for this judging any more: it ends, if it has not yet."""
    if not result.cancel() and not result.cancelled():
        result.exception()  # it has been looked at: asyncio need not warn


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A text to be judged, and who waits for the verdict."""

    turns: Sequence[Turn]
    result: asyncio.Future[Judged]
    loop: asyncio.AbstractEventLoop

    def settle(self, outcome: Judged | BaseException) -> None:
        """From the guard's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self._settle, outcome)

    def _settle(self, outcome: Judged | BaseException) -> None:
        if self.result.done():
            return
        if isinstance(outcome, BaseException):
            self.result.set_exception(outcome)
        else:
            self.result.set_result(outcome)


class Guarding:
    """One guard and its thread. `judge` is for the event loop; the rest may be called from any thread."""

    def __init__(self, settings: Settings, metrics: GuardMetrics, make: Callable[[Rules], Guard] | None = None) -> None:
        """`make` makes the guard. Raises ConfigError for a rule that is none; nothing is loaded or started yet."""
        try:
            self._rules = Rules(settings.guard_allow, settings.guard_block)
        except RuleError as error:
            raise ConfigError(f"guard_allow, guard_block: {error}") from None
        self.settings = settings
        self.metrics = metrics
        self._make = make or self._guard_of_settings
        self._guard: Guard | None = None
        self._thread: threading.Thread | None = None
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False

    def _guard_of_settings(self, rules: Rules) -> Guard:
        return Guard(self.settings.guard_level, rules=rules)

    def load(self) -> Guard:
        """Before the first `judge`, so that it finds the guard ready. Raises ConfigError."""
        if self._guard is None:
            try:
                self._guard = self._make(self._rules)
            except GuardError as error:
                raise ConfigError(str(error)) from None
        return self._guard

    @property
    def version(self) -> str:
        """The classifier's, once something has been judged."""
        return self._guard.card.version if self._guard is not None else "unknown"

    def judge(self, turns: Sequence[Turn]) -> asyncio.Future[Judged]:
        """Begins at once; `let_go` ends it. Raises ShuttingDownError, or the future does."""
        loop = asyncio.get_running_loop()
        job = _Job(turns, loop.create_future(), loop)
        with self._lock:
            if self._closed:
                raise ShuttingDownError("The server is shutting down")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="edgellm-guard", daemon=True)
                self._thread.start()
            self._inbox.put(job)
        return job.result

    def close(self, patience_s: float = 0.0) -> None:
        """Ends what is still being judged with a ShuttingDownError, and the thread after its step, for which it waits
        at most `patience_s` seconds. Idempotent."""
        with self._lock:  # nothing comes in after the end
            self._closed = True
            self._inbox.put(None)
        if self._thread is not None and patience_s:
            self._thread.join(patience_s)

    # --- the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """A step of each judging in turn, so that a long text does not hold up short ones."""
        active: deque[tuple[_Job, Generator[None, None, Verdict]]] = deque()
        while True:
            for job in self._arrivals(wait=not active):
                if job is None:
                    self._end([job for job, _ in active])
                    return
                judging = self._begin(job)
                if judging is not None:
                    active.append((job, judging))
            if active:
                job, judging = active.popleft()
                if self._goes_on(job, judging):
                    active.append((job, judging))

    def _arrivals(self, *, wait: bool) -> Iterator[_Job | None]:
        """What has come in; if `wait`, at least one."""
        with contextlib.suppress(queue.Empty):
            if wait:
                yield self._inbox.get()
            while True:
                yield self._inbox.get_nowait()

    def _begin(self, job: _Job) -> Generator[None, None, Verdict] | None:
        try:
            return self.load().judging(job.turns)
        except Exception:
            self._failed(job)
            return None

    def _goes_on(self, job: _Job, judging: Generator[None, None, Verdict]) -> bool:
        """One step. False if it was the last."""
        if job.result.cancelled():  # read from another thread: a step more or less does not matter
            judging.close()
            return False
        try:
            next(judging)
        except StopIteration as end:
            self.metrics.judged(end.value)
            job.settle(end.value)
            return False
        except Exception:
            self._failed(job)
            return False
        return True

    def _failed(self, job: _Job) -> None:
        _log.exception("the guard has failed on a text")
        self.metrics.failed()
        job.settle(None)

    def _end(self, active: Sequence[_Job]) -> None:
        waiting = [job for job in self._arrivals(wait=False) if job is not None]
        for job in (*active, *waiting):
            job.settle(ShuttingDownError("The server is shutting down"))
