"""The engine thread: the one owner of every llama object.

Other threads talk to it by a queue (`call`, `submit`, `cancel`) and hear back by callbacks. Loaded models take turns,
a step each.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from edgellm.engine.embedder import Embedder, EmbeddingJob
from edgellm.engine.runner import Runner
from edgellm.engine.sequence import Job
from edgellm.engine.types import ErrorEvent, EventSink, GenerateRequest
from edgellm.errors import BackendError, ShuttingDownError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_GATHER_S = 0.01

Worker = Runner | Embedder


class Ticket:
    """A submitted request. `cancel` may be called from any thread, at any time, more than once."""

    def __init__(self, engine: Engine, runner: Runner) -> None:
        self._engine = engine
        self._runner = runner
        self._job: Job | None = None  # known once the engine thread has taken it
        self._cancelled = False

    def cancel(self, index: int | None = None) -> None:
        """The request, or its answer `index`, is no longer wanted: it leaves before the next step.

        Events that are on their way already may still arrive.
        """
        self._cancelled = self._cancelled or index is None
        self._engine.post(lambda: self._cancel(index))

    def _cancel(self, index: int | None) -> None:
        if self._job is not None and not self._job.cancelled:
            self._runner.cancel(self._job, index)

    def _start(self, request: GenerateRequest, sink: EventSink) -> None:
        if not self._cancelled:
            self._job = self._runner.submit(request, sink)


class Engine:
    """Runs workers until closed. Create one for a process."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._workers: list[Worker] = []
        self._closing = False
        self._gate = threading.Lock()  # between posting a message and the thread's end
        self._ended = False
        self.arriving = 0
        """Requests that are being made ready to be submitted; their preparer keeps count."""
        self.after_step: Callable[[], None] = lambda: None
        """Called on the engine thread when events may have gone to their sinks: after every step, and in between."""
        self._thread = threading.Thread(target=self._run, name="edgellm-engine", daemon=True)
        self._thread.start()

    # --- from any thread ------------------------------------------------------------------------------------------

    def post(self, action: Callable[[], None]) -> None:
        """Runs `action` on the engine thread, before its next step. Lost after `close`."""
        self._offer(action)

    def _offer(self, action: Callable[[], None]) -> bool:
        with self._gate:
            if not self._ended:
                self._inbox.put(action)
            return not self._ended

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """Runs `function` on the engine thread; its result or exception arrives in the future.

        After `close` that is a ShuttingDownError.
        """
        future: Future[_T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        if not self._offer(run):
            future.set_exception(ShuttingDownError("The server is shutting down"))
        return future

    def submit(self, runner: Runner, request: GenerateRequest, sink: EventSink) -> Ticket:
        """Starts a request on `runner`; events go to `sink` on the engine thread."""
        ticket = Ticket(self, runner)
        if self._closing or not self._offer(lambda: ticket._start(request, sink)):
            sink([ErrorEvent(ShuttingDownError("The server is shutting down"))])
        return ticket

    def embed(self, embedder: Embedder, job: EmbeddingJob) -> None:
        """Starts an embedding job."""
        if not self._offer(lambda: embedder.submit(job)):
            job.done(ShuttingDownError("The server is shutting down"))

    def add(self, worker: Worker) -> None:
        """Lets `worker` take its turns. Idempotent."""

        def join() -> None:
            if worker not in self._workers:
                self._workers.append(worker)

        self.call(join).result()

    def remove(self, worker: Worker) -> None:
        """Ends what `worker` is doing with an error, takes it out and closes it. Waits for that."""

        def leave() -> None:
            if worker in self._workers:
                self._workers.remove(worker)
            worker.fail_all(ShuttingDownError("The model was unloaded"))
            worker.close()

        with contextlib.suppress(ShuttingDownError):  # then `close` has done it
            self.call(leave).result()

    def close(self, timeout_s: float | None = None) -> bool:
        """Ends every request, closes every worker and stops the thread. Idempotent.

        False if the thread is still inside llama.cpp after `timeout_s` seconds: nothing can interrupt it there.
        """
        if not self._closing:
            self._closing = True
            self.post(lambda: None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- on the engine thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            self._take_messages()
            self.after_step()  # messages report errors, too
            for worker in tuple(self._workers):
                if worker.has_work:
                    self._step(worker)
                    self.after_step()
        with self._gate:
            self._ended = True
        self._drain()
        for worker in reversed(self._workers):  # an embedder's context goes before the runner's model
            worker.fail_all(ShuttingDownError("The server is shutting down"))
            worker.close()
        self._workers.clear()
        self.after_step()

    def _take_messages(self) -> None:
        """All that wait; when there is nothing else to do, waits for one."""
        if not any(worker.has_work for worker in self._workers):
            self._handle(self._inbox.get())
            self._gather()
        self._drain()

    def _gather(self) -> None:
        """After a rest, requests that come together start together: one step over all their prompts is faster than a
        step for the first while the others wait."""
        until_s = time.perf_counter() + _GATHER_S
        while self.arriving > 0 and (rest_s := until_s - time.perf_counter()) > 0:
            with contextlib.suppress(queue.Empty):
                self._handle(self._inbox.get(timeout=rest_s))

    def _drain(self) -> None:
        while True:
            try:
                self._handle(self._inbox.get_nowait())
            except queue.Empty:
                return

    @staticmethod
    def _handle(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            _log.exception("a message to the engine failed")

    def _step(self, worker: Worker) -> None:
        try:
            worker.step()
        except Exception:
            # A bug must not silence the thread that everybody waits for.
            _log.exception("a step failed unexpectedly")
            worker.fail_all(BackendError("internal error in the engine"))
