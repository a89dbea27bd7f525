"""What of a request the guard reads: messages and prompts as turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from guards import Turn
from serving.wire.messages import AssistantMessage, Message, text_of

_SHORT_CHARS = 1 << 16


def chat_turns(messages: Sequence[Message]) -> list[Turn]:
    """Each message as a turn. What an assistant's message calls, and with which arguments, is part of what it says."""
    return [Turn(message.role, _text(message)) for message in messages]


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
