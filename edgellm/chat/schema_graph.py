"""What a schema's references and alternatives may do to a grammar: loops, and ways that multiply.

llama.cpp follows every way in which the text so far can be read. Where two alternatives begin alike and both lead back
to the same choice, the ways double at each level of nesting, and a few brackets stop the server: these are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgellm.errors import SchemaError

Schema = dict[str, Any]
Edges = dict[str, set[str]]

_MAX_WAYS = 1000  # that may be open at once
_MAX_PAIRS = 50_000
_CONSTANTS_A_PAIR = 64  # so many constants to compare cost about as much as a pair
_CONTAINERS = {"object", "array"}
_SCALARS = {"string", "number", "integer", "boolean", "null"}
_OBJECT_KEYS = ("properties", "required", "additionalProperties")
_ARRAY_KEYS = ("items", "prefixItems")


@dataclass(frozen=True, slots=True)
class Union:
    """An anyOf: its node, the nodes of its alternatives, and those as schemas (without $ref at the top)."""

    node: str
    options: tuple[str, ...]
    schemas: tuple[object, ...]
    path: str


def components(edges: Edges) -> dict[str, int]:
    """The strongly connected component of each node, numbered so that edges lead to equal or smaller numbers.

    Tarjan, "Depth-first search and linear graph algorithms" (1972), without recursion.
    """
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    found: dict[str, int] = {}
    open_nodes: list[str] = []
    count = 0
    for first in edges:
        if first in order:
            continue
        work = [(first, iter(edges[first]))]
        order[first] = low[first] = len(order)
        open_nodes.append(first)
        while work:
            node, targets = work[-1]
            target = next(targets, None)
            if target is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    while True:
                        member = open_nodes.pop()
                        found[member] = count
                        if member == node:
                            break
                    count += 1
            elif target not in order:
                order[target] = low[target] = len(order)
                open_nodes.append(target)
                work.append((target, iter(edges.get(target, ()))))
            elif target not in found:
                low[node] = min(low[node], order[target])
    return found


def loops(edges: Edges) -> list[str]:
    """The nodes that lead back to themselves."""
    group = components(edges)
    return [node for node, targets in edges.items() if any(group[target] == group[node] for target in targets)]


class _Look:
    """Compares the constants of schemas, each read once, and counts the work."""

    def __init__(self, expand: Callable[[object], object]) -> None:
        self.expand = expand
        self.work = 0  # in pairs of alternatives
        self._known: dict[int, tuple[object, set[str]]] = {}  # by id(schema), which is kept alive beside

    def disjoint(self, first: object, second: object) -> bool:
        """Whether both have constants, and none in common."""
        one, two = self._constants(first), self._constants(second)
        self.work += min(len(one), len(two)) // _CONSTANTS_A_PAIR
        return bool(one and two and one.isdisjoint(two))

    def _constants(self, schema: object) -> set[str]:
        known = self._known.get(id(schema))
        if known is None:
            known = self._known[id(schema)] = (schema, _constants(self.expand(schema)))
            self.work += len(known[1]) // _CONSTANTS_A_PAIR
        return known[1]


def check_unions(edges: Edges, unions: list[Union], expand: Callable[[object], object]) -> None:
    """Raise SchemaError where open ways multiply without end, or beyond a limit. `expand` follows a schema's $ref."""
    group = components(edges)
    ways: dict[str, int] = {}
    look = _Look(expand)
    for union in unions:
        containers = [
            (node, schema)
            for node, schema in zip(union.options, union.schemas, strict=True)
            if kinds(schema) & _CONTAINERS and edges.get(node)
        ]
        for number, (node, schema) in enumerate(containers):
            alike = 1
            for other_node, other in containers[:number]:
                look.work += 1
                if look.work > _MAX_PAIRS:
                    raise SchemaError("too many alternatives", union.path)
                if _told_apart(schema, other, look):
                    continue
                alike += 1
                if group[node] == group[other_node] == group[union.node]:
                    raise SchemaError(
                        "alternatives of a recursive schema must differ in a required property that comes first "
                        "(a constant, or its name)",
                        union.path,
                    )
            ways[union.node] = max(ways.get(union.node, 1), alike)
    _check_product(edges, group, ways, unions)


def _check_product(edges: Edges, group: dict[str, int], ways: dict[str, int], unions: list[Union]) -> None:
    """The ways of nested choices multiply; refuse more than _MAX_WAYS along any path."""
    own: dict[int, int] = {}
    for node, count in ways.items():
        own[group[node]] = max(own.get(group[node], 1), count)
    most: dict[int, int] = {}
    for node in sorted(edges, key=group.__getitem__):
        here = group[node]
        below = max((most.get(group[t], 1) for t in edges[node] if group[t] != here), default=1)
        most[here] = max(most.get(here, 1), own.get(here, 1) * below)
    for union in unions:
        if most[group[union.node]] > _MAX_WAYS:
            raise SchemaError("alternatives that begin alike are nested too deeply", union.path)


def kinds(schema: object) -> set[str]:
    """The types that a schema's values may have, at most."""
    if not isinstance(schema, dict):
        return _CONTAINERS | _SCALARS
    given = schema.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {name for name in given if isinstance(name, str)}
    if "enum" in schema or "const" in schema:
        return set(_SCALARS)  # a constant never leads back to a choice
    if any(key in schema for key in ("anyOf", "oneOf", "allOf", "$ref")):
        return _CONTAINERS | _SCALARS
    implied = {"object" for key in _OBJECT_KEYS if key in schema} | {"array" for key in _ARRAY_KEYS if key in schema}
    return implied or _CONTAINERS | _SCALARS


def _told_apart(first: object, second: object, look: _Look) -> bool:
    """Whether the first few characters of a value say which of two schemas it follows."""
    both = kinds(first) & kinds(second) & _CONTAINERS
    if not both:
        return True
    if not isinstance(first, dict) or not isinstance(second, dict):
        return False
    if "array" in both and not look.disjoint(_first_item(first), _first_item(second)):
        return False
    return "object" not in both or _objects_told_apart(first, second, look)


def _first_item(schema: Schema) -> object:
    items = schema.get("prefixItems")
    return items[0] if isinstance(items, list) and items and schema.get("minItems", 0) else None


def _objects_told_apart(first: Schema, second: Schema, look: _Look) -> bool:
    for (name, one), (other_name, other) in zip(_required_first(first), _required_first(second), strict=False):
        if name != other_name or look.disjoint(one, other):
            return True
        if kinds(look.expand(one)) & _CONTAINERS or kinds(look.expand(other)) & _CONTAINERS:
            return False
    return False


def _required_first(schema: Schema) -> list[tuple[str, object]]:
    """The required properties that come before any optional one."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return []
    found = []
    for name, value in properties.items():
        if name not in required:
            break
        found.append((name, value))
    return found


def _constants(schema: object) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return {json.dumps(value, sort_keys=True) for value in values} if isinstance(values, list) else set()
