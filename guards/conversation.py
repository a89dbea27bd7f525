"""What of a conversation is judged, and how much each part counts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from guards.text import UNPARTED

Role = Literal["system", "developer", "user", "assistant", "tool"]

EARLIER_TURN = 1.5
"""By how much the log-odds of a turn are lowered that has been answered: the newest is what is to be answered now."""

EARLIER_ANSWER = 3.0
"""The same of an answer: it is the model's own, unless the client has made it up."""

_INSTRUCTIONS = ("system", "developer")  # the operator's, not the user's
_JOINED = 3  # the latest turns of the user that are also read as one text: a request may be spread over them
_SHORT = 6  # words of a turn that may mean "answer it after all" and nothing else
_UNPARTED = re.compile(f"[{UNPARTED}]")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Part:
    """A text to be judged."""

    text: str
    turn: int  # the place of its message in the conversation, of the last one where it joins several
    handicap: float = 0.0  # taken off its log-odds


def parts(turns: Sequence[Turn]) -> Iterator[Part]:
    """What is judged: every turn but the operator's instructions, those after the last answer at full weight, and the
    latest turns of the user in one piece, at full weight where the last is too short to stand for itself.
    """
    newest = _newest(turns)
    for index, turn in enumerate(turns):
        if turn.role in _INSTRUCTIONS or not turn.text.strip():
            continue
        earlier = EARLIER_ANSWER if turn.role == "assistant" else EARLIER_TURN
        yield Part(turn.text, index, 0.0 if index >= newest else earlier)
    spoken = [index for index, turn in enumerate(turns) if turn.role == "user" and turn.text.strip()]
    if len(spoken) > 1:
        alone = _words(turns[spoken[-1]].text) > _SHORT
        joined = "\n".join(turns[index].text for index in spoken[-_JOINED:])
        yield Part(joined, spoken[-1], EARLIER_TURN if alone and spoken[-2] < newest else 0.0)


def _words(text: str) -> int:
    """Roughly: in Chinese, Japanese, Thai and the like, which do not part words, two characters are one."""
    return len(text.split()) + len(_UNPARTED.findall(text)) // 2


def _newest(turns: Sequence[Turn]) -> int:
    """The first turn that has not been answered. An answer at the end is one that the model is to go on with."""
    last = len(turns)
    while last and turns[last - 1].role == "assistant":
        last -= 1
    return next((index + 1 for index in reversed(range(last)) if turns[index].role == "assistant"), 0)
