"""Answers on their way into buffers: written by a thread of its own, for the engine's must not wait for a disk."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgellm.speculative.buffer import ANSWER_TOKENS, PROMPT_TOKENS, AnswerBuffer

_WAITING = 256  # answers; where the disk is slower than they come, further ones are lost

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kept:
    buffer: AnswerBuffer
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    age: int  # how often everything had been forgotten before


class Collector:
    """One for a process. Any thread may call its methods."""

    def __init__(self) -> None:
        self._items: queue.Queue[_Kept | None] = queue.Queue(_WAITING)
        self._writing = threading.Lock()  # also of `_age`
        self._age = 0
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = self._late = False

    def keep(self, buffer: AnswerBuffer, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Has an answer written to `buffer` before long. Quick. After `close` nothing is kept."""
        with self._starting:
            if self._closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="edgellm-collector", daemon=True)
                self._thread.start()
        kept = _Kept(buffer, tuple(prompt[-PROMPT_TOKENS:]), tuple(answer[:ANSWER_TOKENS]), self._age)
        try:
            self._items.put_nowait(kept)
            self._late = False
        except queue.Full:
            if not self._late:
                _log.warning("answers are not kept to learn from: the disk is too slow")
            self._late = True

    def settle(self) -> None:
        """Returns once all that was kept before has been written."""
        self._items.join()

    @contextlib.contextmanager
    def forgetting(self) -> Iterator[None]:
        """What is not written yet is lost, and nothing is written until the end of this: buffers can be deleted."""
        with self._writing:
            self._age += 1
            yield

    def close(self) -> None:
        """Writes what waits, and ends the thread. Idempotent."""
        with self._starting:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            self._items.put(None)
            thread.join()

    def _work(self) -> None:
        while True:
            item = self._items.get()
            try:
                if item is None:
                    return
                with self._writing:
                    if item.age == self._age:
                        item.buffer.append(item.prompt, item.answer)
            except (OSError, ValueError) as error:
                _log.warning("an answer is not kept to learn from: %s", error)
            finally:
                self._items.task_done()
