"""Lists of a user's own: what is always blocked, and what is never held against a text."""

from __future__ import annotations

import re
from collections.abc import Iterable

from guards.errors import RuleError
from guards.text import UNPARTED, clean

_REGEX = "re:"
# What may be at the edge of a word, in scripts that part words.
_WORD = re.compile(rf"[^\W_{UNPARTED}]")


class Rule:
    """A literal, found as whole words (anywhere, in scripts that do not part words) in any case; after `re:`, a regular
    expression (Python's, any case).

    Both are looked for in the text as the classifier reads it: white space collapsed, lookalike letters made Latin.
    """

    __slots__ = ("_pattern", "source")

    def __init__(self, source: str) -> None:
        """Raises RuleError."""
        self.source = source
        if source.startswith(_REGEX):
            pattern = source.removeprefix(_REGEX)
        else:
            literal = clean(source)
            before = r"(?<!\w)" if _WORD.match(literal[:1]) else ""
            after = r"(?!\w)" if _WORD.match(literal[-1:]) else ""
            pattern = before + re.escape(literal) + after if literal else ""
        try:
            self._pattern = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise RuleError(f"the rule {source!r} is not a regular expression: {error}") from None
        if self._pattern.search(""):
            raise RuleError(f"the rule {source!r} matches every text")

    def matches(self, text: str) -> bool:
        """Whether `text` (cleaned) holds what the rule names."""
        return self._pattern.search(text) is not None

    def without(self, text: str) -> str:
        """`text` (cleaned) with every match taken out."""
        return self._pattern.sub(" ", text)


class Rules:
    """Allow and block lists.

    A block rule that matches makes a text unsafe whatever its score. What an allow rule matches is taken out of the
    text before it is scored: the rest is still judged, so that an allowed phrase is no password for anything else.
    Block rules look at the whole text.
    """

    def __init__(self, allow: Iterable[str] = (), block: Iterable[str] = ()) -> None:
        """Raises RuleError."""
        self._allow = [Rule(source) for source in allow]
        self._block = [Rule(source) for source in block]

    def blocking(self, text: str) -> Rule | None:
        """The first block rule that matches `text` (cleaned)."""
        return next((rule for rule in self._block if rule.matches(text)), None)

    def judged(self, text: str) -> str:
        """What of `text` (cleaned) is to be scored."""
        for rule in self._allow:
            text = rule.without(text)
        return " ".join(text.split()) if self._allow else text
