"""What of a request the guard reads: messages and prompts as turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from guards import Turn
from serving.refusals import is_refusal
from serving.wire.messages import AssistantMessage, Message, UserMessage, text_of

_SHORT_CHARS = 1 << 16


def chat_turns(messages: Sequence[Message]) -> list[Turn]:
    """Each message as a turn. What an assistant's message calls, and with which arguments, is part of what it says."""
    return [Turn(message.role, _text(message)) for message in messages]


def without_refused(messages: Sequence[Message]) -> list[Message]:
    """Messages without what the guard has refused to have answered, and without the refusals. So a conversation can go
    on about something else, and nobody can insist: neither guard nor model reads it again."""
    kept: list[Message] = []
    for message, more in zip(messages, [*messages[1:], None], strict=True):
        if more is not None and isinstance(message, AssistantMessage) and is_refusal(_text(message)):
            while kept and isinstance(kept[-1], UserMessage):
                kept.pop()
        else:
            kept.append(message)
    return kept


def prompt_turns(prompt: str, suffix: str | None = None) -> list[Turn]:
    """A prompt to be continued, as if a user had said it; with what is to come after it."""
    return [Turn("user", prompt if suffix is None else f"{prompt}\n{suffix}")]


def is_short(turns: Sequence[Turn]) -> bool:
    """Whether they may be judged before it is known that they fit a context.

    Making a text ready is one step of the guard, about a second for a million characters, in which others wait.
    """
    return sum(len(turn.text) for turn in turns) <= _SHORT_CHARS


def _text(message: Message) -> str:
    text = text_of(message.content)
    if not isinstance(message, AssistantMessage):
        return text
    calls = [f"{call.function.name}\n{call.function.arguments}" for call in message.tool_calls or ()]
    return "\n".join(part for part in (text, message.refusal, *calls) if part)
