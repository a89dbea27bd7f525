"""Where did what was written last stand before, and what followed it there?

An append-only text of token ids in which places are found by the few tokens before them; places that share them form a
chain, newest first, as in the LZ77 compressors. Prompt lookup decoding and SuffixDecoding (arXiv 2411.04975) draft from
the same question.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

CANDIDATES = 8
"""Places that are looked at, newest first."""

LONGEST = 32
"""Tokens that are compared: longer matches count as this long."""

GAP = -1
"""Stands between texts that have nothing to do with each other. No token equals it."""

_BITS = 32  # of a token within a key


@dataclass(frozen=True, slots=True)
class Match:
    """A place before which stands what was written last."""

    text: array[int]
    place: int  # of the token that follows, in `text`
    length: int  # tokens in common before it, at most LONGEST


class SuffixIndex:
    """A growing text of token ids."""

    def __init__(self, order: int, tokens: Sequence[int] = ()) -> None:
        """Places are found by the `order` tokens before them; shorter matches are not seen."""
        self.order = order
        self.text = array("i")
        self._earlier = array("i")  # for each place, the one before it with the same key; -1: none
        self._newest: dict[int, int] = {}  # key -> place
        self._key = 0  # of the last `order` tokens
        self._run = 0  # tokens since the last gap
        self._mask = (1 << _BITS * order) - 1
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens (or GAP). About 0.4 microseconds each."""
        text, earlier, newest, order, mask = self.text, self._earlier, self._newest, self.order, self._mask
        key, run = self._key, self._run
        place = len(text)
        for token in tokens:
            if run >= order and token >= 0:
                earlier.append(newest.get(key, -1))
                newest[key] = place
            else:
                earlier.append(-1)
            text.append(token)
            place += 1
            if token >= 0:
                key = (key << _BITS | token) & mask
                run += 1
            else:
                run = 0
        self._key, self._run = key, run

    def find(self, context: Sequence[int], candidates: int = CANDIDATES) -> list[Match]:
        """Up to `candidates` places before which the last tokens of `context` stand, newest first."""
        order = self.order
        if len(context) < order:
            return []
        key = 0
        for token in context[-order:]:
            key = key << _BITS | token
        place = self._newest.get(key, -1)
        if place < 0:
            return []
        text, earlier = self.text, self._earlier
        found: list[Match] = []
        deepest = min(LONGEST, len(context))
        while place >= 0 and len(found) < candidates:
            length, most = order, min(deepest, place)
            while length < most and text[place - 1 - length] == context[-1 - length]:
                length += 1
            found.append(Match(text, place, length))
            place = earlier[place]
        return found
