"""JSON Schema to GBNF: every text that the grammar lets through is JSON that the schema accepts.

Expressed: type (also lists), properties, required, additionalProperties, propertyNames (objects without properties),
minProperties and maxProperties where they can be counted, items, prefixItems, minItems, maxItems, enum, const, anyOf,
oneOf (as anyOf), allOf and keywords beside $ref or anyOf (merged), $ref within the document, recursion included,
minLength, maxLength, pattern (see gbnf_pattern), the formats in gbnf_pattern.FORMATS, minimum, maximum and their
exclusive forms. Ignored, as the specification has it: annotations, other formats, unknown keywords.
Refused with SchemaError: any other keyword that constrains, contradictions, and schemas beyond the limits below.

Choices: keys come in the schema's order, required keys that it does not describe last. A schema without `type` gets the
types its keywords speak of. Additional keys are written without escapes and never repeat a described key. Bounded
numbers have no exponent. Blanks are at most one space, or one line break with an indent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgellm.chat.gbnf import GrammarBuilder, Inexpressible, alternatives, char_json, literal
from edgellm.chat.schema_converter import add_schema
from edgellm.chat.tool_calls import ToolCallFormat
from edgellm.errors import RequestError, SchemaError

MAX_CALLS = 16  # in one answer


def schema_to_gbnf(schema: object, *, strict: bool = True) -> str:
    """The grammar whose texts are the JSON values that `schema` accepts; its start is `root`.

    `strict`: objects with `properties` and tuples with `prefixItems` are closed unless the schema says otherwise, which
    keeps small models to the point. Otherwise they are open, as JSON Schema has it. Raises SchemaError.
    """
    builder = GrammarBuilder()
    return _render(builder, lambda: add_schema(builder, schema, strict=strict))


def json_object_gbnf() -> str:
    """The grammar of any JSON object."""
    builder = GrammarBuilder()
    return builder.render(builder.json("object"))


def _render(builder: GrammarBuilder, root: Callable[[], str]) -> str:
    try:
        return builder.render(root())
    except Inexpressible as error:
        raise SchemaError(str(error)) from None


def tool_call_gbnf(
    tools: Sequence[Mapping[str, Any]],
    *,
    format: ToolCallFormat,
    name: str | None = None,
    parallel: bool = True,
) -> str:
    """The grammar of an answer that is one tool call or, if `parallel`, up to MAX_CALLS of them, and nothing else.

    `tools` as in the OpenAI request; `name` picks one of them. The same grammar serves as a lazy one: it begins with
    the text that `tool_calls.lazy_patterns` waits for. Llama 3 knows no parallel calls.
    Raises RequestError for a name that is not there, SchemaError for parameters that cannot be expressed.
    """
    chosen = [(number, tool) for number, tool in enumerate(tools) if name is None or tool["function"]["name"] == name]
    if not chosen:
        raise RequestError("there is no such tool" if name is not None else "there are no tools", "tool_choice")
    builder = GrammarBuilder()
    return _render(builder, lambda: _calls(builder, chosen, format, parallel and format != "llama3"))


def _calls(
    builder: GrammarBuilder, tools: list[tuple[int, Mapping[str, Any]]], format: ToolCallFormat, parallel: bool
) -> str:
    ws, colon = builder.json("ws"), builder.json("colon")
    key = "parameters" if format == "llama3" else "arguments"
    name_key, arguments_key = literal('"name"'), literal(char_json(key))
    choices = []
    for number, tool in tools:
        arguments = add_schema(builder, _parameters(tool), path=f"/{number}/function/parameters")
        rest = builder.rule(f'"," {ws} {arguments_key} {colon} {arguments} {ws}', "arguments")
        choices.append(f"{literal(char_json(tool['function']['name']))} {rest}")
    call = builder.rule(f'"{{" {ws} {name_key} {colon} ({alternatives(choices)}) "}}"', "call")
    if format == "hermes":
        call = builder.rule(f'"<tool_call>" "\\n"? {call} "\\n"? "</tool_call>"', "tagged")
    if not parallel:
        return f'"[TOOL_CALLS]" " "? "[" {ws} {call} {ws} "]"' if format == "mistral" else call
    separator = '"\\n"?' if format == "hermes" else f'"," {ws}'
    calls = f"{call} {builder.repeat(builder.rule(f'{separator} {call}', 'more'), 0, MAX_CALLS - 1)}"
    match format:
        case "mistral":
            return f'"[TOOL_CALLS]" " "? "[" {ws} {calls} {ws} "]"'
        case "json":
            return f'{call} | "[" {ws} {calls} {ws} "]"'
        case _:
            return calls


def _parameters(tool: Mapping[str, Any]) -> object:
    """The schema of a tool's arguments: always an object; without `parameters`, an empty one."""
    parameters = tool["function"].get("parameters")
    if parameters is None:
        return {"type": "object", "properties": {}}
    return {"type": "object", **parameters} if isinstance(parameters, dict) else parameters
