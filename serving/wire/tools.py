"""Tools and response formats of a chat request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from serving.wire.common import JsonObject, Text, WirePart

TOOLS_MAX = 128
ToolName = Annotated[Text, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(WirePart):
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = Field(
        default=None, description="JSON schema of the arguments. Default: none are taken."
    )
    strict: bool | None = Field(
        default=None, description="false: calls need not follow the schema unless they are forced."
    )


class Tool(WirePart):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(WirePart):
    name: ToolName


class NamedToolChoice(WirePart):
    """Call this function."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(WirePart):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], Field(fail_fast=True)] = Field(min_length=1, max_length=TOOLS_MAX)


class AllowedToolsChoice(WirePart):
    """Call only among these functions."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_form(value: Any) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    if kind == "allowed_tools":
        return "#allowed_tools"
    return "#function" if kind is not None or isinstance(value, Mapping) else "#mode"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("#mode")]
    | Annotated[NamedToolChoice, Tag("#function")]
    | Annotated[AllowedToolsChoice, Tag("#allowed_tools")],
    Discriminator(_choice_form),
]


class JsonSchemaFormat(WirePart):
    name: ToolName
    description: Text | None = None
    schema_: JsonObject | None = Field(
        default=None, alias="schema", description="The JSON schema. Default: any object."
    )
    strict: bool | None = Field(
        default=None, description="false: objects may have properties that the schema does not name."
    )


class TextResponseFormat(WirePart):
    type: Literal["text"]


class JsonObjectResponseFormat(WirePart):
    type: Literal["json_object"]


class JsonSchemaResponseFormat(WirePart):
    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


ResponseFormat = Annotated[
    TextResponseFormat | JsonObjectResponseFormat | JsonSchemaResponseFormat, Field(discriminator="type")
]
