"""Adapts drafters while nobody waits for answers, one at a time, each in a process of its own, from one thread.

What was not finished when it has to end is begun again later: the answers are still there.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.errors import EdgeLLMError
from edgellm.models.memory import available_memory_bytes
from edgellm.speculative.buffer import AnswerBuffer, Record
from edgellm.speculative.places import merged_path
from edgellm.tune.adaptation_spec import AdaptationSpec
from edgellm.tune.adapted import Adapted, read_adapted, write_adapted
from edgellm.tune.ownership import Ownership
from edgellm.tune.process import Outcome, TrainerProcess
from edgellm.tune.process_slot import ProcessSlot

ADAPTER = (sys.executable, "-P", "-m", "edgellm.tune.adaptation")
LOCK = "adapt.lock"

ANSWERS_NEW = 48
"""Since the last attempt, before another is worth its time."""

_POLL_S = 5.0
# What is taken at most, measured with SmolLM2-135M in Q4_1: 2.2 GB.
_WEIGHTS = 16  # times the drafter's file: its weights as floats, and what layers keep for the way back
_BESIDE_BYTES = 512 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """A model in memory, and the small one that drafts for it."""

    name: str  # of the model
    target: Path
    drafter: Path
    answers: AnswerBuffer
    adapter: Path  # what was learned last, if anything was
    take: Callable[[Path], None]  # a model to be drafted with from now on; raises EdgeLLMError

    @property
    def figures(self) -> Path:
        """What has come of adapting so far: adapted.py."""
        return self.adapter.with_suffix(".json")


class Adapting:
    """At most one of all that share a state directory adapts at a time."""

    def __init__(
        self,
        home: Path,
        pairs: Callable[[], Sequence[Pair]],
        *,
        idle: Callable[[], bool],
        alone: Callable[[], bool] = lambda: True,
        threads: int = 1,
        command: Sequence[str] = ADAPTER,
        answers_new: int = ANSWERS_NEW,
    ) -> None:
        """`idle`: whether nobody has waited for an answer for a while. `alone`: whether nothing else is trained.
        `threads`: to compute with."""
        self._pairs, self._idle, self._alone = pairs, idle, alone
        self._threads, self._command, self._answers_new = threads, tuple(command), answers_new
        self._ownership = Ownership(home, LOCK)
        self._looked: dict[Path, tuple[int, int, int]] = {}  # buffers that had too little, as they were then
        self._slot = ProcessSlot()
        self._lock = threading.Lock()  # of those below
        self._running = ""
        self._held = 0
        self._closing = False
        self._resting = threading.Condition(self._lock)  # no process is there
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    # --- for the server's threads ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._work, name="edgellm-adapting", daemon=True)
                self._thread.start()

    @property
    def running(self) -> str:
        """The model whose drafter is being adapted; empty if none is."""
        return self._running

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def give_way(self) -> None:
        """Halts the process, also one that starts later, until `go_on`. Quick: it is called for every request."""
        self._slot.give_way()

    def go_on(self) -> None:
        """The machine is the process's again."""
        self._slot.go_on()

    def hold(self) -> None:
        """Ends what runs, and begins nothing until `release`. Nothing reads answers or writes adapters then."""
        with self._lock:
            self._held += 1
        self._slot.tell(TrainerProcess.kill)
        with self._resting:
            self._resting.wait_for(lambda: not self._running)

    def release(self) -> None:
        """The end of `hold`."""
        with self._lock:
            self._held -= 1
        self.wake()

    def close(self) -> None:
        """Ends what runs, and begins nothing more. Idempotent."""
        with self._lock:
            self._closing = True
            thread = self._thread
        self._slot.tell(TrainerProcess.kill)
        self._wake.set()
        if thread is not None:
            thread.join()

    # --- the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._closing:
                if not self._turn():
                    self._wake.wait(_POLL_S)
                    self._wake.clear()
        finally:
            self._ownership.release()

    def _turn(self) -> bool:
        """Whether something was done, so that there may be more to do."""
        try:
            if not (self._idle() and self._alone()):
                return False
            for pair in self._pairs():
                if _has_room(pair) and (records := self._due(pair)):
                    return self._adapt(pair, records)
        except (EdgeLLMError, OSError) as error:  # the disk is full, say: this is tried again
            _log.error("drafters cannot be adapted now: %s", error)
        except Exception:
            _log.exception("unexpected error while adapting a drafter")
        return False

    def _due(self, pair: Pair) -> list[Record]:
        """The answers to learn from, if there are enough new ones."""
        try:
            status = pair.answers.path.stat()
        except FileNotFoundError:
            return []
        state = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._looked.get(pair.adapter) == state:
            return []
        records = pair.answers.read()
        if records and read_adapted(pair.figures).fresh(records) >= self._answers_new:
            return records
        self._looked[pair.adapter] = state
        return []

    def _adapt(self, pair: Pair, records: Sequence[Record]) -> bool:
        if not self._ownership.acquire():
            return False
        try:
            with self._lock:
                if self._held or self._closing:
                    return False
                self._running = pair.name
            return self._heed(pair, records, self._run(pair))
        finally:
            self._ownership.release()
            with self._resting:
                self._running = ""
                self._resting.notify_all()

    def _run(self, pair: Pair) -> Outcome:
        spec = AdaptationSpec(
            drafter=pair.drafter,
            target=pair.target,
            buffer=pair.answers.path,
            output=pair.adapter,
            earlier=pair.adapter if pair.adapter.is_file() else None,
            threads=self._threads,
        )
        command = [*self._command, *spec.options()]
        with TrainerProcess(None, self._follow, command=command) as process, self._slot.occupied(process):
            if self._held or self._closing:  # nobody could tell it until now
                process.kill()
            return process.wait()

    def _follow(self, _event: dict[str, Any]) -> None:
        """The process has come a step further. Other training has precedence; requests only halt it."""
        if not self._alone():
            self._slot.tell(TrainerProcess.stop)

    def _heed(self, pair: Pair, records: Sequence[Record], outcome: Outcome) -> bool:
        """Keeps what came of it. Whether there may be more to do now."""
        if self._held:
            return False
        before = read_adapted(pair.figures)
        if outcome.kind == "done":
            after = before.tried(dict(outcome.event), records[-1])
            write_adapted(pair.figures, after)
            _log.info("the drafter of %s was adapted: %s", pair.name, told(after))
            if after.taken > before.taken and not self._closing:
                pair.take(merged_path(pair.adapter))
            return True
        if outcome.kind == "stopped" or self._closing:
            return False
        _log.warning("adapting the drafter of %s failed: %s", pair.name, outcome.message)
        if outcome.code == "adapter_unsound":  # the earlier one: without it there is nothing that it lacks
            pair.take(pair.drafter)
            for path in (pair.adapter, merged_path(pair.adapter)):
                path.unlink(missing_ok=True)
            return True
        write_adapted(pair.figures, before.broken(records[-1]))
        return True


def told(adapted: Adapted) -> str:
    """How the last adaptation went, in words."""
    if adapted.acceptance_before is None or adapted.acceptance_after is None:
        return "there was too little to learn from"
    if adapted.acceptance_after == adapted.acceptance_before:
        return f"no gain, {adapted.acceptance_before:.1%} of its tokens are accepted as before"
    return f"{adapted.acceptance_after:.1%} of its tokens are accepted, {adapted.acceptance_before:.1%} before"


def _has_room(pair: Pair) -> bool:
    needed, free = _BESIDE_BYTES + _WEIGHTS * pair.drafter.stat().st_size, available_memory_bytes()
    if free < needed:
        _log.debug("%s: adapting needs %d bytes, and %d are free", pair.drafter.name, needed, free)
    return free >= needed
