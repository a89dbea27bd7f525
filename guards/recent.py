"""What was computed lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

LONG = 1000
"""Characters of a text that is not worth keeping: a window has fewer, but for words that nobody writes."""


class Recent(Generic[Key, Value]):
    """Values by key, at most `most` of them: the one that was asked for longest ago goes first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value, which counts as asked for; None where it is not known."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def keep(self, key: Key, value: Value, text: str) -> None:
        """Unless `text`, which it belongs to, is longer than LONG."""
        if len(text) <= LONG:
            self._values[key] = value
            self._values.move_to_end(key)
            if len(self._values) > self._most:
                self._values.popitem(last=False)
