"""Values named in a JSON schema: numeric bounds, and constants as GBNF."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from edgellm.chat.gbnf import GrammarBuilder, Inexpressible, char_json, literal
from edgellm.chat.gbnf_number import Bounds
from edgellm.errors import SchemaError


def read_bounds(schema: dict[str, Any], path: str) -> Bounds:
    """The tighter of the inclusive and the exclusive bound on either side. Raises SchemaError."""
    values: dict[str, Decimal] = {}
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if key in schema:
            value = schema[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise SchemaError(f"{key} must be a number", f"{path}/{key}")
            values[key] = Decimal(str(value))
    low, low_open = values.get("minimum"), False
    if (open_low := values.get("exclusiveMinimum")) is not None and (low is None or open_low >= low):
        low, low_open = open_low, True
    high, high_open = values.get("maximum"), False
    if (open_high := values.get("exclusiveMaximum")) is not None and (high is None or open_high <= high):
        high, high_open = open_high, True
    return Bounds(low, low_open, high, high_open)


def fits(value: object, types: list[str], low: int, high: int | None, bounds: Bounds) -> bool:
    """Whether a constant is of one of the types, a string `low` to `high` long, a number within the bounds."""
    match value:
        case None:
            return "null" in types
        case bool():
            return "boolean" in types
        case str():
            return "string" in types and low <= len(value) and (high is None or len(value) <= high)
        case int() | float():
            if not math.isfinite(value):
                raise Inexpressible("NaN and infinity are not JSON")
            whole = isinstance(value, int) or value.is_integer()
            return ("number" in types or ("integer" in types and whole)) and bounds.contains(Decimal(str(value)))
        case list():
            return "array" in types
        case dict():
            return "object" in types
    return False


def same(first: object, second: object) -> bool:
    """Equality of JSON values: 1 is not true."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def constant(builder: GrammarBuilder, value: object) -> str:
    """An expression for one JSON value, written as usual, with the usual freedom of blanks. Raises Inexpressible."""
    ws = builder.json("ws")
    comma = f' "," {ws} '
    if isinstance(value, dict):
        colon = builder.json("colon")
        pairs = [f"{literal(char_json(key))} {colon} {constant(builder, item)}" for key, item in value.items()]
        return f'"{{" {ws} {comma.join(pairs)} {ws} "}}"' if pairs else f'"{{" {ws} "}}"'
    if isinstance(value, list):
        items = [constant(builder, item) for item in value]
        return f'"[" {ws} {comma.join(items)} {ws} "]"' if items else f'"[" {ws} "]"'
    if isinstance(value, float) and not math.isfinite(value):
        raise Inexpressible("NaN and infinity are not JSON")
    return literal(json.dumps(value, ensure_ascii=False))
