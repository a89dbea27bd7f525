"""Chat messages as they come in: one type a role. Only text is taken; other content is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from serving.wire.common import Text, WirePart, fault

TOOL_CALLS_MAX = 128
PARTS_MAX = 4096


class TextPart(WirePart):
    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("type") in ("image_url", "input_audio", "file"):
            raise fault(f"is {data['type']!r}, but the model takes text only", "type")
        return data


class RefusalPart(WirePart):
    type: Literal["refusal"]
    refusal: Text


def _content_form(value: Any) -> str:
    return "#parts" if isinstance(value, list) else "#text"


def _assistant_part_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return "#refusal" if kind == "refusal" else "#text"


AssistantPart = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[RefusalPart, Tag("#refusal")], Discriminator(_assistant_part_kind)
]
Content = Annotated[
    Annotated[Text, Tag("#text")]
    | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=PARTS_MAX), Tag("#parts")],
    Discriminator(_content_form),
]
AssistantContent = Annotated[
    Annotated[Text, Tag("#text")]
    | Annotated[list[AssistantPart], Field(fail_fast=True, min_length=1, max_length=PARTS_MAX), Tag("#parts")],
    Discriminator(_content_form),
]


def text_of(content: str | list[TextPart] | list[AssistantPart] | None) -> str:
    """The content as one string; parts are joined without anything between them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


class SystemMessage(WirePart):
    role: Literal["system"]
    content: Content
    name: Text | None = None


class DeveloperMessage(WirePart):
    role: Literal["developer"]
    content: Content
    name: Text | None = None


class UserMessage(WirePart):
    role: Literal["user"]
    content: Content
    name: Text | None = None


class CalledFunction(WirePart):
    name: Text
    arguments: Text = Field(description="The arguments, as JSON text.")


class ToolCall(WirePart):
    id: Text
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(WirePart):
    role: Literal["assistant"]
    content: AssistantContent | None = Field(
        default=None, description="Required unless there are tool_calls or a refusal."
    )
    refusal: Text | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = Field(default=None, max_length=TOOL_CALLS_MAX)

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls and self.refusal is None:
            raise fault("is required unless the assistant's message has 'tool_calls' or a 'refusal'", "content")
        return self


class ToolMessage(WirePart):
    role: Literal["tool"]
    content: Content
    tool_call_id: Text = Field(min_length=1, description="Which tool call this answers.")


Message = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]
