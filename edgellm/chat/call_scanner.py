"""One tool call's JSON object, character by character."""

from __future__ import annotations

import enum
import json

_BLANKS = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class Step(enum.Enum):
    """What a character was."""

    MORE = enum.auto()  # part of the object
    START = enum.auto()  # the `{` of the arguments, with the name known: the call is certain
    ARGUMENT = enum.auto()  # of the arguments of a call that is certain
    DONE = enum.auto()  # the `}` that ends the object
    MALFORMED = enum.auto()  # does not belong here


class _At(enum.Enum):
    BEGIN = enum.auto()
    KEY = enum.auto()
    COLON = enum.auto()
    VALUE = enum.auto()
    AFTER = enum.auto()


class CallScanner:
    """Follows the structure of `{"name": ..., "arguments": {...}}`; keys in any order, others are passed over.

    Arguments are followed by their brackets and strings alone: whether they are right is for their reader to say.
    """

    def __init__(self) -> None:
        self.name = ""
        self.arguments: str | None = None  # set at the end, if the call did not start before
        self.has_arguments = False  # whatever their type
        self.started = False
        self._at = _At.BEGIN
        self._key = ""
        self._first = True  # no member has been read
        self._text: list[str] = []  # of the key or value at hand
        self._depth = 0  # of brackets in the value at hand
        self._in_string = False
        self._escaped = False
        self._streams = False  # the value at hand goes out as it comes

    def step(self, char: str) -> Step:
        """Take the next character. After DONE or MALFORMED there is no next one."""
        if self._in_string:
            return self._string(char)
        if self._depth:
            return self._nested(char)
        match self._at:
            case _At.BEGIN:
                self._at = _At.KEY
                return Step.MORE if char == "{" else Step.MALFORMED
            case _At.VALUE if self._text:
                return self._scalar(char)
        if char in _BLANKS:
            return Step.MORE
        match self._at:
            case _At.KEY if char == '"':
                self._in_string = True
                self._text = [char]
                return Step.MORE
            case _At.KEY if char == "}" and self._first:
                return Step.DONE
            case _At.COLON if char == ":":
                self._at = _At.VALUE
                self._text = []
                return Step.MORE
            case _At.VALUE:
                return self._value(char)
            case _At.AFTER if char == ",":
                self._at = _At.KEY
                return Step.MORE
            case _At.AFTER if char == "}":
                return Step.DONE
        return Step.MALFORMED

    def _value(self, char: str) -> Step:
        self._first = False
        self._text = [char]
        if char in "{[":
            self._depth = 1
            if char == "{" and self._key in _ARGUMENTS and self.name and not self.has_arguments:
                self.started = self.has_arguments = True
                self._text = [""]
                self._streams = True
                return Step.START
        elif char == '"':
            self._in_string = True
        elif char in "}],:":
            return Step.MALFORMED
        return Step.MORE

    def _string(self, char: str) -> Step:
        self._keep(char)
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            if not self._depth and not self._close_string():
                return Step.MALFORMED
        return Step.ARGUMENT if self._streams else Step.MORE

    def _keep(self, char: str) -> None:
        if not self._streams:
            self._text.append(char)

    def _close_string(self) -> bool:
        """A key or a string value is complete; false if it is no JSON."""
        if self._at is _At.KEY:
            try:
                self._key = json.loads("".join(self._text), strict=False)
            except ValueError:
                return False
            self._at = _At.COLON
            return True
        return self._close_value()

    def _nested(self, char: str) -> Step:
        self._keep(char)
        streams = self._streams
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if not self._depth:
                if streams:
                    self._streams = False
                    self._at = _At.AFTER
                elif not self._close_value():
                    return Step.MALFORMED
        return Step.ARGUMENT if streams else Step.MORE

    def _scalar(self, char: str) -> Step:
        if char not in ",}" and char not in _BLANKS:
            self._text.append(char)
            return Step.MORE
        if not self._close_value():
            return Step.MALFORMED
        return self.step(char)

    def _close_value(self) -> bool:
        """A value is complete; false if it is no JSON, or not what its key needs."""
        text = "".join(self._text)
        self._text = []
        self._at = _At.AFTER
        try:
            value = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            return False
        if self._key == "name":
            self.name = self.name or (value if isinstance(value, str) else "")
            return bool(self.name)
        if self._key in _ARGUMENTS and not self.has_arguments:
            self.has_arguments = True
            if isinstance(value, str):  # small models write the object as a string, as the wire format has it
                try:
                    inner = json.loads(value)
                except (ValueError, RecursionError):
                    return False
                text, value = value, inner
            if value is None:
                text, value = "{}", {}
            self.arguments = text
            return isinstance(value, dict)
        return True
