"""What of a conversation is judged, and how much each part counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]

EARLIER_TURN = 1.5
"""By how much the log-odds of a turn are lowered that has been answered: the newest is what is to be answered now."""

EARLIER_ANSWER = 3.0
"""The same of an answer: it is the model's own, unless the client has made it up."""

_INSTRUCTIONS = ("system", "developer")  # the operator's, not the user's
_JOINED = 3  # the latest turns of the user that are also read as one text: a request may be spread over them
_SHORT = 6  # words of a turn that may mean "answer it after all" and nothing else


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


def parts(turns: Sequence[Turn], refusals: Sequence[str] = ()) -> Iterator[Part]:
    """What is judged: every turn but the operator's instructions, those after the last answer at full weight, and the
    latest turns of the user in one piece, at full weight where the last is too short to stand for itself.

    A turn that was answered with one of `refusals` has had its answer: it is judged no more, so that the conversation
    can go on about something else, unless the newest turn is so short that it may ask for just that.
    """
    newest = _newest(turns)
    refused = {
        index
        for index, turn in enumerate(turns[:-1])
        if turn.role == "user" and turns[index + 1].role == "assistant" and turns[index + 1].text.strip() in refusals
    }
    for index, turn in enumerate(turns):
        if turn.role in _INSTRUCTIONS or not turn.text.strip() or index in refused:
            continue
        earlier = EARLIER_ANSWER if turn.role == "assistant" else EARLIER_TURN
        yield Part(turn.text, index, 0.0 if index >= newest else earlier)
    spoken = [index for index, turn in enumerate(turns) if turn.role == "user" and turn.text.strip()]
    alone = bool(spoken) and len(turns[spoken[-1]].text.split()) > _SHORT
    if alone:
        spoken = [index for index in spoken if index not in refused]
    if len(spoken) > 1:
        joined = "\n".join(turns[index].text for index in spoken[-_JOINED:])
        yield Part(joined, spoken[-1], EARLIER_TURN if alone and spoken[-2] < newest else 0.0)


def _newest(turns: Sequence[Turn]) -> int:
    """The first turn that has not been answered. An answer at the end is one that the model is to go on with."""
    last = len(turns)
    while last and turns[last - 1].role == "assistant":
        last -= 1
    return next((index + 1 for index in reversed(range(last)) if turns[index].role == "assistant"), 0)
