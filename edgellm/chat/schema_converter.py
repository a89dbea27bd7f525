"""A JSON schema, walked: every subschema becomes an expression, every reference a rule of its own (see json_schema)."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from edgellm.chat.gbnf import GrammarBuilder, Inexpressible, alternatives, char_json, literal
from edgellm.chat.gbnf_number import integers, numbers
from edgellm.chat.gbnf_pattern import FORMATS, format_gbnf, pattern_gbnf
from edgellm.chat.schema_graph import Edges, Union, check_unions, loops
from edgellm.chat.schema_merge import REFUSED, TYPE_KEYWORDS, merge, whole_number
from edgellm.chat.schema_shapes import array_rule, object_rule
from edgellm.chat.schema_values import constant, fits, read_bounds, same
from edgellm.errors import SchemaError

Schema = dict[str, Any]

MAX_DEPTH = 64
_MAX_PARTS = 200  # of one allOf
MAX_NODES = 10_000  # subschemas looked at, those that allOf and anyOf multiply included
MAX_ENUM = 2_000
MAX_OPTIONAL = 500  # of one object: any of them may come next, and llama.cpp tries each

_CHECKED_ON_VALUES = (
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "format",  # an annotation here: the value is given
)
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def add_schema(builder: GrammarBuilder, schema: object, *, strict: bool = True, path: str = "") -> str:
    """Add a schema's rules and return the expression for its values; `$ref` is relative to this schema.

    Raises SchemaError, with `path` in front of where in the schema.
    """
    return _Converter(builder, schema, strict, path).convert()


class _Converter:
    """One schema document. References become rules of their own, worked off one after another."""

    def __init__(self, builder: GrammarBuilder, schema: object, strict: bool, path: str) -> None:
        self._builder = builder
        self._document = schema
        self._strict = strict
        self._base = path
        self._nodes = 0
        self._ref_rules: dict[str, str] = {}
        self._queue: list[str] = []
        self._direct: Edges = {}  # references that a rule reaches without writing anything in between
        self._edges: Edges = {}  # what references and alternatives lead to
        self._unions: list[Union] = []
        self._inside: list[str] = []  # the reference and the alternatives that are being visited

    def convert(self) -> str:
        self._check_nesting()
        start = self._ref_rule("#")
        while self._queue:
            ref = self._queue.pop()
            path = self._base + ref[1:]
            self._enter(ref)
            expr = self._visit(self._resolve(ref, path), path, 0, ref)
            self._inside.pop()
            self._builder.define(self._ref_rules[ref], expr)
        for ref in loops(self._direct):
            raise SchemaError(f"$ref {ref!r} refers to itself", self._base + ref[1:])
        check_unions(self._edges, self._unions, lambda schema: self._expand(schema, self._base))
        return start

    def _check_nesting(self) -> None:
        """Bound the nesting of the document as JSON, so that nothing below runs out of stack."""
        level = [self._document]
        for _ in range(3 * MAX_DEPTH):
            level = [
                item
                for node in level
                if isinstance(node, dict | list)
                for item in (node.values() if isinstance(node, dict) else node)
            ]
            if not level:
                return
        raise SchemaError(f"the schema is nested more than {MAX_DEPTH} deep", self._base)

    def _enter(self, node: str) -> None:
        self._edges.setdefault(node, set())
        self._inside.append(node)

    # References

    def _ref_rule(self, ref: str) -> str:
        if ref not in self._ref_rules:
            self._ref_rules[ref] = self._builder.reserve("s")
            self._queue.append(ref)
        return self._ref_rules[ref]

    def _resolve(self, ref: object, path: str) -> object:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise SchemaError(f"$ref {ref!r}: only references within the schema (#/...) can be followed", path)
        node = self._document
        for token in ref.split("/")[1:]:
            key = unquote(token).replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and key.isdecimal() and key.isascii() and len(key) < 7 and int(key) < len(node):
                node = node[int(key)]
            else:
                raise SchemaError(f"$ref {ref!r} leads nowhere", path)
        return node

    def _expand(self, schema: object, path: str) -> object:
        """The schema with its own $ref, if any, merged in."""
        seen = set()
        while isinstance(schema, dict) and "$ref" in schema:
            self._count(path)
            ref = schema["$ref"]
            target = self._resolve(ref, path)
            if ref in seen:
                raise SchemaError(f"$ref {ref!r} refers to itself", path)
            seen.add(ref)
            rest = {key: value for key, value in schema.items() if key != "$ref"}
            schema = self._merge(target, rest, path)
        return schema

    def _merge(self, first: object, second: object, path: str) -> object:
        self._count(path)
        return merge(first, second, path)

    def _count(self, path: str) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise SchemaError(f"the schema has more than {MAX_NODES} parts, counting all combinations", path)

    # Schemas

    def _visit(self, schema: object, path: str, depth: int, owner: str | None) -> str:
        """An expression for one schema. `owner` is the reference whose rule starts right here, without text before."""
        self._count(path)
        if depth > MAX_DEPTH:
            raise SchemaError(f"the schema is nested more than {MAX_DEPTH} deep", path)
        if schema is True:
            return self._builder.json("value")
        if schema is False:
            raise SchemaError("false accepts no value", path)
        if not isinstance(schema, dict):
            raise SchemaError("a schema must be an object or a boolean", path)
        try:
            return self._visit_object(schema, path, depth, owner)
        except Inexpressible as error:
            raise SchemaError(str(error), path) from None

    def _visit_object(self, schema: Schema, path: str, depth: int, owner: str | None) -> str:
        self._refuse(schema, path)
        if "$ref" in schema:
            if not any(key in TYPE_KEYWORDS for key in schema if key != "$ref"):
                ref = schema["$ref"]
                self._resolve(ref, path)
                if owner is not None:
                    self._direct.setdefault(owner, set()).add(ref)
                self._edges[self._inside[-1]].add(ref)
                self._edges.setdefault(ref, set())
                return self._ref_rule(ref)
            return self._visit(self._expand(schema, path), path, depth + 1, owner)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._any_of(schema, key, path, depth, owner)
        if "allOf" in schema:
            return self._visit(self._all_of(schema, path), path, depth + 1, owner)
        if "enum" in schema or "const" in schema:
            return self._enum(schema, path)
        options = [self._of_type(name, schema, path, depth) for name in self._types(schema, path)]
        return options[0] if len(options) == 1 else self._builder.rule(alternatives(options), "v")

    def _refuse(self, schema: Schema, path: str) -> None:
        for key in REFUSED:
            if key in schema:
                raise SchemaError(f"{key} cannot be expressed as a grammar", f"{path}/{key}")
        for key in ("unevaluatedProperties", "unevaluatedItems"):
            if schema.get(key, True) not in (True, {}):
                raise SchemaError(f"{key} cannot be expressed as a grammar", f"{path}/{key}")
        if schema.get("uniqueItems", False) is not False:
            raise SchemaError("uniqueItems cannot be expressed as a grammar", f"{path}/uniqueItems")
        if "multipleOf" in schema and not (schema["multipleOf"] == 1 and schema.get("type") == "integer"):
            raise SchemaError("multipleOf cannot be expressed as a grammar", f"{path}/multipleOf")

    def _any_of(self, schema: Schema, key: str, path: str, depth: int, owner: str | None) -> str:
        choices = schema[key]
        if not isinstance(choices, list) or not choices:
            raise SchemaError(f"{key} must be a list of schemas", f"{path}/{key}")
        rest = {name: value for name, value in schema.items() if name != key}
        merging = any(name in TYPE_KEYWORDS for name in rest)
        options, nodes, schemas = [], [], []
        union = f"{path}/{key}#{len(self._edges)}"
        self._edges[self._inside[-1]].add(union)
        self._enter(union)
        for number, choice in enumerate(choices):
            here = f"{path}/{key}/{number}"
            whole = self._merge(self._expand(choice, here), rest, here) if merging else choice
            nodes.append(f"{union}:{number}")
            schemas.append(self._expand(whole, here))
            self._edges[union].add(nodes[-1])
            self._enter(nodes[-1])
            options.append(self._visit(whole, here, depth + 1, owner))
            self._inside.pop()
        self._inside.pop()
        self._unions.append(Union(union, tuple(nodes), tuple(schemas), f"{path}/{key}"))
        return self._builder.rule(alternatives(options), "v")

    def _all_of(self, schema: Schema, path: str) -> object:
        parts = schema["allOf"]
        if not isinstance(parts, list) or not parts:
            raise SchemaError("allOf must be a list of schemas", f"{path}/allOf")
        if len(parts) > _MAX_PARTS:
            raise SchemaError(f"allOf has more than {_MAX_PARTS} parts", f"{path}/allOf")
        whole: object = {name: value for name, value in schema.items() if name != "allOf"}
        for number, part in enumerate(parts):
            here = f"{path}/allOf/{number}"
            whole = self._merge(whole, self._expand(part, here), here)
        return whole

    def _types(self, schema: Schema, path: str) -> list[str]:
        given = schema.get("type")
        if given is None:
            implied = dict.fromkeys(spoken for key in schema if (spoken := TYPE_KEYWORDS.get(key)) is not None)
            return list(implied) or ["value"]
        names = given if isinstance(given, list) else [given]
        if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
            raise SchemaError(f"type {given!r} is none of JSON Schema's", f"{path}/type")
        return [name for name in dict.fromkeys(names) if name != "integer" or "number" not in names]

    def _of_type(self, name: str, schema: Schema, path: str, depth: int) -> str:
        match name:
            case "object":
                return self._object(schema, path, depth)
            case "array":
                return self._array(schema, path, depth)
            case "string":
                return self._string(schema, path)
            case "number" | "integer":
                return self._number(name, schema, path)
            case _:
                return self._builder.json(name)

    # Scalars

    def _string(self, schema: Schema, path: str) -> str:
        low, high = self._range(schema, "minLength", "maxLength", path)
        pattern, form = schema.get("pattern"), schema.get("format")
        if pattern is not None:
            if not isinstance(pattern, str):
                raise SchemaError("pattern must be a string", f"{path}/pattern")
            return self._builder.rule(pattern_gbnf(self._builder, pattern, low, high), "f")
        if isinstance(form, str) and form in FORMATS:
            return format_gbnf(self._builder, form, low, high)
        if low == 0 and high is None:
            return self._builder.json("string")
        chars = self._builder.repeat(self._builder.json("char"), low, high)
        return self._builder.rule(rf'"\"" {chars} "\""', "f")

    def _number(self, name: str, schema: Schema, path: str) -> str:
        bounds = read_bounds(schema, path)
        if bounds.low is None and bounds.high is None:
            return self._builder.json(name)
        return self._builder.rule(integers(bounds) if name == "integer" else numbers(bounds), "d")

    def _enum(self, schema: Schema, path: str) -> str:
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list) or not 0 < len(values) <= MAX_ENUM:
            raise SchemaError(f"enum must be a list of 1 to {MAX_ENUM} values", f"{path}/enum")
        if "const" in schema:
            values = [value for value in values if same(value, schema["const"])]
        for key in schema:
            if TYPE_KEYWORDS.get(key) and key not in _CHECKED_ON_VALUES:
                raise SchemaError(f"{key} together with enum or const", f"{path}/{key}")
        types = self._types(schema, path) if "type" in schema else list(_TYPES)
        low, high = self._range(schema, "minLength", "maxLength", path)
        bounds = read_bounds(schema, path)
        kept = [value for value in values if fits(value, types, low, high, bounds)]
        if not kept:
            raise SchemaError("enum or const leaves no value of the right type and bounds", path)
        texts = [char_json(value) for value in kept if isinstance(value, str)]
        others = [constant(self._builder, value) for value in kept if not isinstance(value, str)]
        options = [self._builder.literals(texts), *others] if texts else others
        return self._builder.rule(alternatives(options), "e")

    def _range(self, schema: Schema, low_key: str, high_key: str, path: str) -> tuple[int, int | None]:
        low = whole_number(schema.get(low_key, 0), f"{path}/{low_key}")
        high = None if high_key not in schema else whole_number(schema[high_key], f"{path}/{high_key}")
        if high is not None and high < low:
            raise SchemaError(f"{low_key} is larger than {high_key}", f"{path}/{low_key}")
        return low, high

    # Arrays

    def _array(self, schema: Schema, path: str, depth: int) -> str:
        low, high = self._range(schema, "minItems", "maxItems", path)
        first, rest = schema.get("prefixItems", []), schema.get("items", None)
        rest_key = "items"
        if isinstance(rest, list):  # before 2020-12, items was what prefixItems is now
            first, rest, rest_key = rest, schema.get("additionalItems"), "additionalItems"
        if not isinstance(first, list):
            raise SchemaError("prefixItems must be a list of schemas", f"{path}/prefixItems")
        if rest is None:
            rest = not (first and self._strict)
        if rest is False:
            high = len(first) if high is None else min(high, len(first))
            if low > high:
                raise SchemaError("minItems asks for more items than are allowed", f"{path}/minItems")
        prefix_key = "prefixItems" if rest_key == "items" else "items"
        items = [
            self._visit(item, f"{path}/{prefix_key}/{number}", depth + 1, None)
            for number, item in enumerate(first[:high] if high is not None else first)
        ]
        left = None if high is None else high - len(items)
        more = "" if left == 0 else self._visit(rest, f"{path}/{rest_key}", depth + 1, None)
        return array_rule(self._builder, items, more, low, left)

    # Objects

    def _object(self, schema: Schema, path: str, depth: int) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict) or not all(isinstance(key, str) for key in properties):
            raise SchemaError("properties must be an object", f"{path}/properties")
        if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
            raise SchemaError("required must be a list of strings", f"{path}/required")
        extra = schema.get("additionalProperties", not ("properties" in schema and self._strict))
        undescribed = schema.get("additionalProperties", True)  # of required keys
        pairs: list[tuple[str, bool]] = []
        keys = {key: value for key, value in properties.items() if value is not False or key in required}
        for key in dict.fromkeys([*keys, *required]):
            if key not in keys and undescribed is False:
                raise SchemaError(f"required property {key!r} is not allowed", f"{path}/required")
            where = f"{path}/properties/{_escape(key)}" if key in keys else f"{path}/additionalProperties"
            value = self._visit(keys.get(key, undescribed), where, depth + 1, None)
            pairs.append((f"{literal(char_json(key))} {self._builder.json('colon')} {value}", key in required))
        if len(pairs) - sum(needed for _, needed in pairs) > MAX_OPTIONAL:
            raise SchemaError(f"more than {MAX_OPTIONAL} optional properties", f"{path}/properties")
        member = None
        low, high = self._counts(schema, pairs, extra is not False, path)
        if extra is not False and high != 0:
            value = self._visit(extra, f"{path}/additionalProperties", depth + 1, None)
            names = [*properties, *required]
            member = self._builder.rule(
                f"{self._key(schema, names, path, depth)} {self._builder.json('colon')} {value}", "m"
            )
        elif "propertyNames" in schema and pairs:
            raise SchemaError("propertyNames beside properties", f"{path}/propertyNames")
        return object_rule(self._builder, pairs, member, low, high)

    def _key(self, schema: Schema, names: list[str], path: str, depth: int) -> str:
        rule = schema.get("propertyNames", True)
        if rule is True or rule == {}:
            return self._builder.key_except(names) if names else self._builder.json("string")
        where = f"{path}/propertyNames"
        if names:
            raise SchemaError("propertyNames beside properties", where)
        return self._visit(self._merge(self._expand(rule, where), {"type": "string"}, where), where, depth + 1, None)

    def _counts(
        self, schema: Schema, pairs: list[tuple[str, bool]], is_open: bool, path: str
    ) -> tuple[int, int | None]:
        """minProperties (0 or 1) and maxProperties, once those that follow from the properties are dropped."""
        low, high = self._range(schema, "minProperties", "maxProperties", path)
        needed = sum(required for _, required in pairs)
        low = 0 if low <= needed else low
        if low > 1:  # keys may repeat, so that they cannot be counted from below
            raise SchemaError("minProperties over 1 cannot be expressed as a grammar", f"{path}/minProperties")
        if high is not None and pairs:
            if is_open or high < len(pairs):
                raise SchemaError("maxProperties beside optional properties", f"{path}/maxProperties")
            high = None
        if low and (high == 0 or not (pairs or is_open)):
            raise SchemaError("minProperties asks for a property that is not allowed", f"{path}/minProperties")
        return low, high


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
