"""Building blocks of GBNF, llama.cpp's grammar language: rules, literals, character classes, repetition, JSON.

Facts about llama.cpp (`src/llama-grammar.cpp`) that shape this file: rule names are letters, digits and dashes; a
bounded repetition becomes as many rules as its bound, and a bound over 2,000 is refused or, worse, silently dropped; an
empty class matches the empty string; left recursion is refused, but not found where a rule is empty by way of another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

MAX_BYTES = 1 << 20  # of the whole grammar
MAX_WEIGHT = 200_000  # elements after llama.cpp has expanded repetitions
UNBOUNDED_FROM = 1_000_000  # an upper bound beyond this is longer than any answer, and dropped
_CHUNK = 1000  # repetitions above this are built of chunks, within llama.cpp's limit of 2,000
_MAX_TRIE_CHARS = 200

Ranges = tuple[tuple[int, int], ...]
"""A set of characters: sorted, disjoint, inclusive ranges of code points."""

ALL_CHARS: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
PLAIN_CHARS: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF))
"""What may stand in a JSON string as itself. Positive, so that llama.cpp also refuses encoded surrogates."""

_JSON_RULES = {
    # One space, or one line break with a bounded indent: a small model must not be able to babble blanks for ever.
    "ws": r'" "? | "\n" [ \t]{0,16}',
    "colon": r'":" " "?',
    "hex": "[0-9a-fA-F]",
    # No lone surrogates: they are not text, and parsers differ on them. A pair is one character.
    "escape": r'["\\/bfnrt] | "u" ([0-9a-cA-CeEfF] hex hex hex | [dD] [0-7] hex hex'
    r' | [dD] [89abAB] hex hex "\\u" [dD] [c-fC-F] hex hex)',
    "char": r'[\x20-\x21\x23-\x5B\x5D-\uD7FF\uE000-\U0010FFFF] | "\\" escape',
    "string": r'"\"" char* "\""',
    # Bounded digits keep integers within 64 bits and numbers finite, and stop endless digits.
    "integer": '"0" | "-"? [1-9] [0-9]{0,17}',
    "number": r'"-"? ("0" | [1-9] [0-9]{0,17}) ("." [0-9]{1,15})? ([eE] [+\-]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "object": '"{" ws (member ("," ws member)* ws)? "}"',
    "member": "string colon value",
    "array": '"[" ws (value ("," ws value)* ws)? "]"',
}
_JSON_NEEDS = {
    "escape": ("hex",),
    "char": ("escape",),
    "string": ("char",),
    "value": ("object", "array", "string", "number", "boolean", "null"),
    "object": ("ws", "member"),
    "member": ("string", "colon", "value"),
    "array": ("ws", "value"),
}


class Inexpressible(Exception):  # noqa: N818 - never shown: json_schema raises SchemaError, with the place, instead
    """What a grammar cannot express, or not within the limits."""


class GrammarBuilder:
    """Collects rules; equal bodies share one rule. Raises Inexpressible when the grammar grows beyond its limits."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._by_body: dict[str, str] = {}
        self._count = 0
        self._bytes = 0
        self._weight = 0

    def json(self, name: str) -> str:
        """The name of a JSON rule (`value`, `string`, `ws`, ...), which is added with all that it needs."""
        if name not in self._rules:
            self._add(name, _JSON_RULES[name])
            for needed in _JSON_NEEDS.get(name, ()):
                self.json(needed)
        return name

    def rule(self, body: str, hint: str = "r") -> str:
        """The name of a rule with this body."""
        if (name := self._by_body.get(body)) is None:
            name = self.reserve(hint)
            self.define(name, body)
            self._by_body[body] = name
        return name

    def reserve(self, hint: str) -> str:
        """A new name, to be given a body by `define` later (recursive rules need it)."""
        self._count += 1
        return f"{hint}-{self._count}"

    def define(self, name: str, body: str) -> None:
        """Give a reserved name its body."""
        self._add(name, body)

    def repeat(self, item: str, low: int, high: int | None) -> str:
        """`item` at least `low` and at most `high` times (None: any number). `item` is a rule's name or a class."""
        if high is not None and high > UNBOUNDED_FROM:
            high = None
        if low > UNBOUNDED_FROM:
            raise Inexpressible(f"a minimum length of {low} is longer than any answer")
        parts = [self._exactly(item, low)] if low else []
        if high is None:
            parts.append(f"{item}*")
        elif high > low:
            parts.append(self._at_most(item, high - low))
        return " ".join(parts) or '""'

    def _exactly(self, item: str, count: int) -> str:
        if count <= 1:
            return item
        if count <= _CHUNK:
            self._weight += count
            return self.rule(f"{item}{{{count}}}", "n")
        chunk = self._exactly(item, _CHUNK)
        whole = self._exactly(chunk, count // _CHUNK)
        rest = count % _CHUNK
        return f"{whole} {self._exactly(item, rest)}" if rest else whole

    def _at_most(self, item: str, count: int) -> str:
        if count <= 1:
            return f"{item}?"
        if count <= _CHUNK:
            self._weight += 2 * count
            return self.rule(f"{item}{{0,{count}}}", "n")
        # Chunk by chunk: a full chunk and then the rest, or an unfinished chunk. At most two ways stay open at a time.
        chunk, part = self._exactly(item, _CHUNK), self._at_most(item, _CHUNK - 1)
        rest = self._at_most(item, count % _CHUNK) if count % _CHUNK else '""'
        for _ in range(count // _CHUNK):
            rest = self.rule(f"{chunk} {rest} | {part}", "n")
        return rest

    def literals(self, texts: Iterable[str]) -> str:
        """One of these texts. Many are arranged by common prefix, so that few ways are open at any character."""
        unique = sorted(set(texts))
        if len(unique) <= 8 or max(map(len, unique)) > _MAX_TRIE_CHARS:
            return alternatives([literal(text) for text in unique])
        return self._trie(unique, 0)

    def _trie(self, texts: Sequence[str], at: int) -> str:
        """`texts` (sorted, distinct) agree in their first `at` characters; what may follow those."""
        if len(texts) == 1:
            return literal(texts[0][at:])
        first, last = texts[0], texts[-1]
        common = at
        while common < len(first) and first[common] == last[common]:
            common += 1
        options = ['""'] if len(first) == common else []
        start = len(options)
        while start < len(texts):
            end = start
            while end < len(texts) and texts[end][common] == texts[start][common]:
                end += 1
            options.append(self._trie(texts[start:end], common))
            start = end
        branch = self.rule(alternatives(options), "t")
        return f"{literal(first[at:common])} {branch}" if common > at else branch

    def key_except(self, names: Iterable[str]) -> str:
        """A JSON string, without escapes, that is none of `names`; quotes included."""
        plain = char_class(PLAIN_CHARS)
        # A name that needs an escape cannot be written without one, so it cannot come up.
        known = sorted({name for name in names if len(char_json(name)) == len(name) + 2})
        if not known:
            return self.rule(rf'"\"" {plain}* "\""', "k")
        if max(map(len, known)) > _MAX_TRIE_CHARS:
            raise Inexpressible(f"property names over {_MAX_TRIE_CHARS} characters beside additionalProperties")
        return self.rule(rf'"\"" {self._unlike(known, 0)} "\""', "k")

    def _unlike(self, names: Sequence[str], at: int) -> str:
        plain = char_class(PLAIN_CHARS)
        options = ['""'] if len(names[0]) > at else []
        names = names if options else names[1:]
        taken: list[str] = []
        start = 0
        while start < len(names):
            end = start
            while end < len(names) and names[end][at] == names[start][at]:
                end += 1
            taken.append(names[start][at])
            options.append(f"{literal(names[start][at])} {self._unlike(names[start:end], at + 1)}")
            start = end
        other = char_class(subtract(PLAIN_CHARS, ranges_of(taken)))
        return self.rule(alternatives([*options, f"{other} {plain}*"]), "u")

    def render(self, root: str) -> str:
        """The whole grammar, starting at the expression `root`."""
        lines = [f"root ::= {root}", *(f"{name} ::= {body}" for name, body in self._rules.items())]
        self._check()
        return "\n".join(lines) + "\n"

    def _add(self, name: str, body: str) -> None:
        self._rules[name] = body
        self._bytes += len(name) + len(body.encode()) + 6
        self._weight += 2 + len(body) // 8
        self._check()

    def _check(self) -> None:
        if self._bytes > MAX_BYTES or self._weight > MAX_WEIGHT:
            raise Inexpressible("the schema is too large for a grammar")


def alternatives(options: Iterable[str]) -> str:
    """Any one of the expressions, as the body of a rule; repeated ones are dropped."""
    return " | ".join(dict.fromkeys(options))


def literal(text: str) -> str:
    """A GBNF literal. Raises Inexpressible for text that is not valid Unicode."""
    out = []
    for char in text:
        code = ord(char)
        if 0xD800 <= code <= 0xDFFF:
            raise Inexpressible("text with a lone surrogate")
        if char in '"\\':
            out.append("\\" + char)
        else:
            out.append(f"\\x{code:02X}" if code < 0x20 or code == 0x7F else char)
    return '"' + "".join(out) + '"'


def char_class(ranges: Ranges) -> str:
    """A GBNF character class. `ranges` must not be empty: llama.cpp would let `[]` match nothing at all."""
    if not ranges:
        raise Inexpressible("an empty character class")
    return "[" + "".join(_class_item(low, high) for low, high in ranges) + "]"


def _class_item(low: int, high: int) -> str:
    return _class_char(low) if low == high else f"{_class_char(low)}-{_class_char(high)}"


def _class_char(code: int) -> str:
    if code < 0x80:
        return chr(code) if chr(code).isalnum() else f"\\x{code:02X}"
    return f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}"


def char_json(text: str) -> str:
    """A text as JSON writes it, in its usual spelling."""
    return json.dumps(text, ensure_ascii=False)


def ranges_of(chars: Iterable[str]) -> Ranges:
    """The set of these characters."""
    return union([(ord(char), ord(char)) for char in chars])


def union(parts: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges in any order, overlapping or not, as a set."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(parts):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def subtract(ranges: Ranges, taken: Ranges) -> Ranges:
    """`ranges` without `taken`."""
    left: list[tuple[int, int]] = []
    for low, high in ranges:
        start = low
        for out_low, out_high in taken:
            if out_high < start or out_low > high:
                continue
            if out_low > start:
                left.append((start, out_low - 1))
            start = out_high + 1
        if start <= high:
            left.append((start, high))
    return tuple(left)


def intersect(first: Ranges, second: Ranges) -> Ranges:
    """What both hold."""
    return tuple((max(a, c), min(b, d)) for a, b in first for c, d in second if max(a, c) <= min(b, d))
