r"""Regular expressions (JSON Schema's `pattern` and `format`) as GBNF over the text of a JSON string.

Understood: literals, `.`, classes, `\d \w \s` and their complements, the escapes for control characters, `\xHH`,
`\uHHHH`, groups (capturing, named or not), alternation, `* + ? {m} {m,} {m,n}` and their lazy forms, `^` at the start
and `$` at the end of the pattern or of one of its top alternatives. Without an anchor anything may stand on that side.
Refused: look-around, back references, `\b`, `\p`, flags, anchors elsewhere, repetition of what may be empty.
Negated classes, `.`, `\D \W \S` leave out control characters and `\d \w \s` hold ASCII only: every text that the
grammar lets through matches, though not every match is let through.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.chat.gbnf import (
    PLAIN_CHARS,
    GrammarBuilder,
    Inexpressible,
    Ranges,
    alternatives,
    char_class,
    char_json,
    intersect,
    literal,
    subtract,
    union,
)

_MAX_CHARS = 4096
_MAX_GROUPS = 24  # nested
_MAX_SPAN = 5000  # ways in which nested bounded repetitions can divide a text
_PRINTABLE: Ranges = ((0x20, 0xD7FF), (0xE000, 0x10FFFF))
_DIGITS: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0A), (0x0D, 0x0D), (0x20, 0x20))
_LINE_ENDS: Ranges = ((0x85, 0x85), (0x2028, 0x2029))
_CLASSES = {
    "d": _DIGITS,
    "w": _WORD,
    "s": _SPACE,
    # The complements leave out what any dialect counts as a digit, a letter or a blank: only ASCII is left.
    "D": subtract(((0x20, 0x7E),), _DIGITS),
    "W": subtract(((0x20, 0x7E),), _WORD),
    "S": ((0x21, 0x7E),),
}
_CONTROLS = {"n": 0x0A, "t": 0x09, "r": 0x0D, "f": 0x0C, "v": 0x0B, "0": 0x00}


@dataclass(frozen=True, slots=True)
class _Part:
    """An expression and how many characters of text it stands for (`longest` None: any number)."""

    expr: str
    shortest: int
    longest: int | None
    atomic: bool = False  # a rule's name or a class: may be repeated as it is
    span: int = 1  # the largest product of nested bounds within


def pattern_gbnf(builder: GrammarBuilder, pattern: str, low: int = 0, high: int | None = None) -> str:
    """An expression for the JSON strings, quotes included, whose text the pattern matches.

    `low` and `high` (minLength, maxLength) must follow from the pattern itself: the two cannot be combined.
    Raises Inexpressible.
    """
    if len(pattern) > _MAX_CHARS:
        raise Inexpressible(f"a pattern of more than {_MAX_CHARS} characters")
    part = _Parser(builder, pattern).parse()
    if part.shortest < low or (high is not None and (part.longest is None or part.longest > high)):
        raise Inexpressible("a pattern together with minLength or maxLength that does not follow from it")
    return rf'"\"" {_group(part.expr)} "\""'


def _group(expr: str) -> str:
    return f"({expr})" if "|" in expr else expr


def _add(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


class _Parser:
    def __init__(self, builder: GrammarBuilder, pattern: str) -> None:
        self._builder = builder
        self._text = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> _Part:
        part = self._alternation(top=True)
        if self._at < len(self._text):
            raise self._error("an unmatched )")
        return part

    def _error(self, what: str) -> Inexpressible:
        return Inexpressible(
            f"pattern {self._text[:80]!r}: {what} at character {self._at}, which a grammar cannot express"
        )

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise self._error("an unexpected end")
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _alternation(self, *, top: bool) -> _Part:
        parts = [self._sequence(top=top)]
        while self._take("|"):
            parts.append(self._sequence(top=top))
        if len(parts) == 1:
            return parts[0]
        lengths = [part.longest for part in parts]
        longest = None if None in lengths else max(length for length in lengths if length is not None)
        shortest, span = min(part.shortest for part in parts), max(part.span for part in parts)
        return _Part(alternatives([part.expr for part in parts]), shortest, longest, span=span)

    def _sequence(self, *, top: bool) -> _Part:
        exprs: list[str] = []
        shortest, span = 0, 1
        total: int | None = 0
        if top and not self._take("^"):
            exprs.append(f"{self._builder.json('char')}*")
            total = None
        anchored = False
        while self._peek() not in ("", "|", ")"):
            if self._take("$"):
                if not top or self._peek() not in ("", "|"):
                    raise self._error("$ that is not at the end")
                anchored = True
                break
            part = self._quantified()
            exprs.append(_group(part.expr))
            shortest += part.shortest
            span = max(span, part.span)
            total = _add(total, part.longest)
        if top and not anchored:
            exprs.append(f"{self._builder.json('char')}*")
            total = None
        return _Part(" ".join(exprs) or '""', shortest, total, span=span)

    def _quantified(self) -> _Part:
        part = self._atom()
        bounds = self._quantifier()
        if bounds is None:
            return part
        low, high = bounds
        if (high is None or high > 1) and part.shortest == 0:
            raise self._error("repetition of what may be empty")
        count = max(low, high or 1)
        span = part.span * count if part.longest != part.shortest else max(part.span, count)
        if span > _MAX_SPAN and part.longest != part.shortest:
            raise self._error("nested repetition of more than it can follow")
        item = part.expr if part.atomic else self._builder.rule(part.expr, "p")
        longest = None if high is None or part.longest is None else part.longest * high
        expr = self._builder.repeat(item, low, high)
        if self._peek() in ("*", "+", "?", "{") and self._peek():
            raise self._error("a quantifier after a quantifier")
        return _Part(expr, part.shortest * low, longest, span=span)

    def _quantifier(self) -> tuple[int, int | None] | None:
        bounds: tuple[int, int | None]
        if self._take("*"):
            bounds = (0, None)
        elif self._take("+"):
            bounds = (1, None)
        elif self._take("?"):
            bounds = (0, 1)
        elif self._take("{"):
            low = self._number()
            high: int | None = low
            if self._take(","):
                high = None if self._peek() == "}" else self._number()
            if not self._take("}") or (high is not None and high < low):
                raise self._error("a malformed quantifier")
            bounds = (low, high)
        else:
            return None
        self._take("?")  # lazy: the same language
        return bounds

    def _number(self) -> int:
        start = self._at
        while self._peek().isdecimal() and self._peek().isascii():
            self._at += 1
        if not 0 < self._at - start <= 7:
            raise self._error("a malformed quantifier")
        return int(self._text[start : self._at])

    def _atom(self) -> _Part:
        char = self._next()
        if char == "(":
            return self._parenthesis()
        if char == "[":
            return self._set(self._class())
        if char == ".":
            return self._set(subtract(_PRINTABLE, _LINE_ENDS))
        if char == "\\":
            return self._set(self._escape(in_class=False))
        if char in "*+?{^":
            raise self._error(f"a stray {char}")
        return self._set(((ord(char), ord(char)),))

    def _parenthesis(self) -> _Part:
        if self._take("?"):
            if self._take("P<") or (
                self._text.startswith("<", self._at) and self._text[self._at + 1 : self._at + 2] not in "=!"
            ):
                while self._next() != ">":
                    pass
            elif not self._take(":"):
                raise self._error("look-around or a flag")
        self._depth += 1
        if self._depth > _MAX_GROUPS:
            raise self._error("too many nested groups")
        part = self._alternation(top=False)
        self._depth -= 1
        if not self._take(")"):
            raise self._error("a missing )")
        return part

    def _set(self, chars: Ranges) -> _Part:
        """One character out of a set, as JSON spells it."""
        options = []
        if plain := intersect(chars, PLAIN_CHARS):
            options.append(char_class(plain))
        for low, high in subtract(chars, PLAIN_CHARS):
            options += [literal(char_json(chr(code))[1:-1]) for code in range(low, high + 1) if code < 0xD800]
        if not options:
            raise self._error("an empty class")
        expr = options[0] if len(options) == 1 and plain else self._builder.rule(alternatives(options), "c")
        return _Part(expr, 1, 1, atomic=True)

    def _escape(self, *, in_class: bool) -> Ranges:
        char = self._next()
        if char in _CLASSES:
            return _CLASSES[char]
        if char in _CONTROLS and not (char == "0" and self._peek().isdecimal()):
            code = _CONTROLS[char]
        elif char in ("x", "u"):
            code = self._hex(2 if char == "x" else 4)
        elif char == "b" and in_class:
            code = 0x08
        elif char.isascii() and char.isalnum():
            raise self._error(f"\\{char}")
        else:
            code = ord(char)
        return ((code, code),)

    def _hex(self, digits: int) -> int:
        text = self._text[self._at : self._at + digits]
        if len(text) != digits or not all(char in "0123456789abcdefABCDEF" for char in text):
            raise self._error("a malformed escape")
        self._at += digits
        return int(text, 16)

    def _class(self) -> Ranges:
        negated = self._take("^")
        parts: list[tuple[int, int]] = []
        if self._peek() == "]":
            raise self._error("an empty class")  # or a literal ], depending on the dialect
        while not self._take("]"):
            first = self._class_item()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._class_item()
                if len(first) != 1 or len(last) != 1 or first[0][0] != first[0][1] or first[0][0] > last[0][0]:
                    raise self._error("a malformed range")
                parts.append((first[0][0], last[0][1]))
            else:
                parts += first
        chars = union(parts)
        return subtract(_PRINTABLE, chars) if negated else chars

    def _class_item(self) -> Ranges:
        char = self._next()
        if char == "\\":
            return self._escape(in_class=True)
        if char == "[":
            raise self._error("a nested class")
        return ((ord(char), ord(char)),)


_HOST = r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*(\.[A-Za-z0-9]+(-[A-Za-z0-9]+)*)*"
_YEAR = r"(000[1-9]|00[1-9]\d|0[1-9]\d{2}|[1-9]\d{3})"
_BY_FOUR = r"(0[48]|[2468][048]|[13579][26])"
_LEAP = rf"(\d\d{_BY_FOUR}|{_BY_FOUR}00)"
_DATE = (
    rf"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    rf"|{_LEAP}-02-29)"
)
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+\-]([01]\d|2[0-3]):[0-5]\d)"
_CLOCK = r"T(\d{1,4}H(\d{1,4}M(\d{1,4}S)?)?|\d{1,4}M(\d{1,4}S)?|\d{1,4}S)"
_DAYS = r"(\d{1,4}Y(\d{1,4}M(\d{1,4}D)?)?|\d{1,4}M(\d{1,4}D)?|\d{1,4}D)"
_OCTET = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P({_DAYS}({_CLOCK})?|{_CLOCK}|\\d{{1,4}}W)",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "email": rf"[A-Za-z0-9_+\-]+(\.[A-Za-z0-9_+\-]+)*@{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"{_OCTET}(\.{_OCTET}){{3}}",
    "ipv6": r"[0-9a-f]{1,4}(:[0-9a-f]{1,4}){7}",
    "uri": r"[a-z][a-z0-9+.\-]*:[A-Za-z0-9._~:/?@!$&'()*+,;=\-]+",
}
"""The formats that are enforced, each as a pattern for a part of what the format allows: RFC 3339 without leap seconds,
lower-case UUIDs, plain addresses, IPv6 in its full form. Other formats are annotations, as JSON Schema has it."""


def format_gbnf(builder: GrammarBuilder, name: str, low: int = 0, high: int | None = None) -> str:
    """An expression for the JSON strings of a format in FORMATS. Raises Inexpressible as `pattern_gbnf` does."""
    return builder.rule(pattern_gbnf(builder, f"^({FORMATS[name]})$", low, high), "f")
