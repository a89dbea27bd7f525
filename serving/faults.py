"""Pydantic's validation errors as one readable sentence, a dotted path and a code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN_CHARS = 60
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a request: `param` is a path such as messages[0].content, None for the whole body."""

    message: str
    param: str | None
    code: str


def _path(loc: Sequence[int | str], body: Any, *, missing: bool) -> str:
    """The path of an error. Pydantic puts names of union branches between the fields; they are left out.

    Our own branches start with "#"; those of discriminated unions are the discriminator's value. Walking down `body`
    tells them from fields: a field is there, unless it is the last step and `missing`.
    """
    path, here = "", body
    for index, step in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(step, int):
            path += f"[{step}]"
            here = here[step] if isinstance(here, list) and step < len(here) else None
            continue
        if step.startswith("#") or step == "[key]":
            continue
        if isinstance(here, Mapping):
            if step in here:
                here = here[step]
            elif not (last and missing):
                continue
        path = _join(path, step)
    return path


def _join(path: str, step: str) -> str:
    if not _PLAIN.fullmatch(step):
        return f"{path}[{shown(step)}]"
    return f"{path}.{step}" if path else step


def shown(value: Any) -> str:
    """A value as a message may repeat it: short, and printable whatever it holds."""
    if value is None or isinstance(value, (bool, int, float, str)):
        try:
            text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
        except ValueError:
            text = "a very large number"  # Python does not print integers of thousands of digits
        text = text.encode("utf-8", "backslashreplace").decode()
        return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"
    return "an array" if isinstance(value, (list, tuple)) else "an object"


# What is expected, by pydantic's error type; {…} are filled in from the error's context.
_EXPECTED = {
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "extra_forbidden": "is not a known field",
    "list_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "finite_number": "must be a finite number",
    "string_unicode": "must be valid Unicode",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must match {pattern}",
}
_SIZES = {"too_short", "too_long", "string_too_short", "string_too_long"}


def _size(kind: str, context: Mapping[str, Any]) -> str:
    """The sentence for something too long or too short."""
    least, most = context.get("min_length"), context.get("max_length")
    unit = "character" if kind.startswith("string") else "item"
    if least is not None:
        return "must not be empty" if least == 1 else f"must have at least {least} {unit}s"
    return f"must have at most {most} {unit}s"


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _union(path: str, error: Mapping[str, Any]) -> Fault:
    """No branch of a discriminated union fits: `role` or `type` is missing or unknown."""
    context = error.get("ctx", {})
    field = str(context.get("discriminator", "")).strip("'")
    where = _join(path, field)
    given = error.get("input")
    if isinstance(given, Mapping) and field not in given:
        return Fault(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
    if not isinstance(given, Mapping):
        return Fault(f"Invalid type for '{path}': must be an object, not {shown(given)}.", path, "invalid_type")
    expected, tag = context.get("expected_tags", "a known value"), shown(given[field])
    return Fault(f"Invalid value for '{where}': must be one of {expected}, not {tag}.", where, "invalid_value")


def _one(error: Mapping[str, Any], path: str) -> Fault:
    """One of pydantic's errors."""
    kind, context, param = str(error["type"]), error.get("ctx", {}), path or None
    if kind == "fault":
        below = context.get("param")
        where = f"{path}{'.' if path and below and not below.startswith('[') else ''}{below or ''}"
        subject = f"'{where}'" if where else "The request body"
        return Fault(f"{subject} {context['message']}.", where or None, "invalid_value")
    if kind == "missing":
        if not path:
            return Fault("The request needs a JSON body.", None, "missing_required_parameter")
        return Fault(f"Missing required parameter: '{path}'.", path, "missing_required_parameter")
    if kind.startswith("union_tag"):
        return _union(path, error)
    if kind in _SIZES:
        wanted = _size(kind, context)
    elif kind in _EXPECTED:
        wanted = _EXPECTED[kind].format(**{name: _number(value) for name, value in context.items()})
    else:
        wanted = f"is not valid ({error.get('msg', kind)})"
    if "input" in error and kind not in _SIZES and wanted.startswith("must"):
        wanted += f", not {shown(error['input'])}"
    wrong_type = kind.endswith("_type") or kind == "int_from_float"
    if not path:
        return Fault(f"The request body {wanted}.", None, "invalid_type" if wrong_type else "invalid_value")
    heading = "type" if wrong_type else "value"
    return Fault(f"Invalid {heading} for '{path}': {wanted}.", param, f"invalid_{heading}")


def describe(errors: Sequence[Any], body: Any) -> Fault:
    """The first of pydantic's `errors`, in words, with the number of the others.

    `body` is what was validated, None where it is not at hand. Takes FastAPI's lists, in which each location starts
    with where the value comes from ("body", "query", "path" or "header").
    """
    if not errors:
        return Fault("The request is not valid.", None, "invalid_value")
    first = errors[0]
    if first["type"] == "json_invalid":
        detail = first.get("ctx", {}).get("error", "")
        place = f" at character {first['loc'][-1]}" if isinstance(first["loc"][-1], int) else ""
        return Fault(f"The request body is not valid JSON: {detail}{place}.", None, "invalid_json")
    source, *loc = first["loc"] or ("body",)
    path = _path(loc, body if source == "body" else None, missing=first["type"] == "missing")
    fault = _one(first, path)
    if len(errors) == 1:
        return fault
    more = f" ({len(errors) - 1} more error{'s' if len(errors) > 2 else ''} in the request.)"
    return Fault(fault.message + more, fault.param, fault.code)
