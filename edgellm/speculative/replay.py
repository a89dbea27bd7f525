"""How a drafter does along answers that are known: what it drafts is compared with what the target wrote."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgellm.speculative.buffer import Record
from edgellm.speculative.drafter import SEQUENCES, Drafter
from edgellm.speculative.proposer import Prompt, Want


@dataclass(frozen=True, slots=True)
class Replay:
    """Sums over answers."""

    drafted: int = 0
    accepted: int = 0
    calls: int = 0  # of the target: each writes what was accepted, and a token of its own
    tokens: int = 0
    seconds: float = field(default=0.0, compare=False)  # of drafting; an answer's first draft, which reads, left out

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that the target wrote as well."""
        return self.accepted / max(1, self.drafted)

    @property
    def tokens_per_call(self) -> float:
        return self.tokens / max(1, self.calls)

    def __add__(self, other: Replay) -> Replay:
        return Replay(
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            self.calls + other.calls,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
        )


@dataclass(slots=True, eq=False)
class _Answer:
    """One that is being replayed."""

    record: Record
    state: Any
    done: int = 0

    @property
    def context(self) -> tuple[int, ...]:
        return self.record.prompt + self.record.answer[: self.done]

    @property
    def left(self) -> int:
        return len(self.record.answer) - self.done


def replay(drafter: Drafter, records: Sequence[Record], *, most: int, together: int = SEQUENCES) -> Iterator[Replay]:
    """Goes through each answer as greedy decoding would, with drafts of up to `most` tokens; yields each one's sums as
    it ends. `together` answers are gone through at a time. The drafter learns nothing of how its guesses do."""
    waiting = deque(records)
    going: list[tuple[_Answer, Replay]] = []
    while waiting or going:
        while waiting and len(going) < together:
            record = waiting.popleft()
            going.append((_Answer(record, drafter.begin(Prompt(record.prompt, 0.0))), Replay()))
        started = time.perf_counter()
        guesses = drafter.propose([Want(one.state, one.context, min(most, one.left)) for one, _ in going])
        each_s = (time.perf_counter() - started) / len(going)
        still = []
        for (one, sums), guess in zip(going, guesses, strict=True):
            seconds = each_s if one.done else 0.0
            total = sums + _step(drafter, one, () if guess is None else guess.tokens, seconds)
            if one.left:
                still.append((one, total))
            else:
                drafter.end(one.state, one.record.answer)
                yield total
        going = still


def _step(drafter: Drafter, one: _Answer, guess: Sequence[int], seconds: float) -> Replay:
    """One call of the target."""
    follows = one.record.answer[one.done :]
    accepted = next((at for at, token in enumerate(guess) if token != follows[at]), len(guess))
    drawn = follows[: accepted + 1]
    drafter.extend(one.state, drawn)
    one.done += len(drawn)
    return Replay(len(guess), accepted, 1, len(drawn), seconds)
