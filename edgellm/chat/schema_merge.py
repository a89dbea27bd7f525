"""Two JSON schemas as one that accepts what both accept (for allOf, and for keywords beside $ref or anyOf)."""

from __future__ import annotations

import json
from typing import Any

from edgellm.errors import SchemaError

TYPE_KEYWORDS: dict[str, str | None] = {
    "properties": "object",
    "required": "object",
    "additionalProperties": "object",
    "propertyNames": "object",
    "minProperties": "object",
    "maxProperties": "object",
    "items": "array",
    "prefixItems": "array",
    "additionalItems": "array",
    "minItems": "array",
    "maxItems": "array",
    "minLength": "string",
    "maxLength": "string",
    "pattern": "string",
    "format": "string",
    "minimum": "number",
    "maximum": "number",
    "exclusiveMinimum": "number",
    "exclusiveMaximum": "number",
    "type": None,
    "enum": None,
    "const": None,
    "anyOf": None,
    "oneOf": None,
    "allOf": None,
    "$ref": None,
}
"""The keywords that constrain and can be expressed, each with the type it speaks of."""

REFUSED = (
    "not",
    "if",
    "then",
    "else",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "patternProperties",
    "contains",
    "minContains",
    "maxContains",
    "$dynamicRef",
    "$recursiveRef",
)
"""The keywords that constrain and are always refused."""

_REFUSED_BY_VALUE = ("uniqueItems", "multipleOf", "unevaluatedProperties", "unevaluatedItems")
_LARGER = ("minProperties", "minItems", "minLength", "minimum", "exclusiveMinimum")
_SMALLER = ("maxProperties", "maxItems", "maxLength", "maximum", "exclusiveMaximum")

Schema = dict[str, Any]


def whole_number(value: object, path: str) -> int:
    """A count in a schema (2.0 counts as 2). Raises SchemaError for anything but a whole number of at least 0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SchemaError("must be a whole number, 0 or more", path)
    return value


def merge(first: object, second: object, path: str) -> object:
    """A schema for the values that both accept. Neither may have a $ref at its top. Raises SchemaError."""
    for one, other in ((first, second), (second, first)):
        if one is False:
            return False
        if one is True or one == {}:
            return other
    if not isinstance(first, dict) or not isinstance(second, dict):
        raise SchemaError("a schema must be an object or a boolean", path)
    merged: Schema = dict(first)
    for key, value in second.items():
        if key not in first:
            merged[key] = value
        elif first[key] != value or isinstance(value, bool) or isinstance(first[key], bool):
            merged[key] = _merge_keyword(key, first[key], value, path)
    for key in ("anyOf", "oneOf"):
        if key in first and key in second and first[key] != second[key]:
            merged[key] = first[key]
            merged["allOf"] = [*_list(merged.get("allOf", []), path), {key: second[key]}]
    _merge_properties(merged, first, second, path)
    return merged


def _list(value: object, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise SchemaError("must be a list", path)
    return value


def _merge_keyword(key: str, first: Any, second: Any, path: str) -> Any:
    here = f"{path}/{key}"
    if key == "type":
        return _merge_types(first, second, here)
    if key in ("enum", "required", "allOf"):
        one, two = _list(first, here), _list(second, here)
        if key == "enum":
            return _common(one, two, here)
        return [*one, *(item for item in two if item not in one)] if key == "required" else [*one, *two]
    if key == "const":
        return _common([first], [second], here)[0]
    if key in _LARGER or key in _SMALLER:
        for value in (first, second):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise SchemaError("must be a number", here)
        return max(first, second) if key in _LARGER else min(first, second)
    if key in ("items", "propertyNames") and not isinstance(first, list) and not isinstance(second, list):
        return _both(first, second)
    if key in _REFUSED_BY_VALUE:
        raise SchemaError(f"{key} cannot be expressed as a grammar", here)
    if key in TYPE_KEYWORDS and key not in ("properties", "additionalProperties", "anyOf", "oneOf"):
        raise SchemaError(f"two different values of {key} cannot be combined", here)
    return second  # merged by the caller, or an annotation


def _common(one: list[Any], two: list[Any], path: str) -> list[Any]:
    texts = {json.dumps(value, sort_keys=True) for value in two}
    kept = [value for value in one if json.dumps(value, sort_keys=True) in texts]
    if not kept:
        raise SchemaError("no value is allowed by both parts", path)
    return kept


def _merge_types(first: Any, second: Any, path: str) -> list[str]:
    one = first if isinstance(first, list) else [first]
    two = second if isinstance(second, list) else [second]
    kept = [name for name in one if name in two]
    for a, b in ((one, two), (two, one)):
        if "integer" in a and "number" in b and "integer" not in kept and "number" not in kept:
            kept.append("integer")
    if not kept:
        raise SchemaError("no type is allowed by both parts", path)
    return kept


def _both(first: object, second: object) -> object:
    """A schema for both, merged only when it is looked at."""
    if first is False or second is False:
        return False
    if first is True or first == {}:
        return second
    if second is True or second == {} or first == second:
        return first
    return {"allOf": [first, second]}


def _is_object_part(schema: Schema) -> bool:
    return "properties" in schema or "additionalProperties" in schema


def _merge_properties(merged: Schema, first: Schema, second: Schema, path: str) -> None:
    """Properties of either side also have to pass the other side's additionalProperties."""
    if not (_is_object_part(first) and _is_object_part(second)):
        return
    sides = []
    for schema in (first, second):
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise SchemaError("properties must be an object", f"{path}/properties")
        sides.append((properties, schema.get("additionalProperties", True)))
    (one, one_more), (two, two_more) = sides
    properties = {}
    for key in dict.fromkeys([*one, *two]):
        properties[key] = _both(one.get(key, one_more), two.get(key, two_more))
    if "properties" in first or "properties" in second:
        merged["properties"] = properties
    if "additionalProperties" in first or "additionalProperties" in second:
        merged["additionalProperties"] = _both(one_more, two_more)
