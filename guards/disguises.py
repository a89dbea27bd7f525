"""Undoes what hides words from a classifier but not from a language model: encodings, letters set apart, digits for
letters.

None of it is certain: `undisguised` gives a second reading of a text, to be judged beside the first, never instead.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import math
import re
import urllib.parse
from collections.abc import Iterable

_MOST_LAYERS = 3  # encodings within encodings
_LEAST_DECODED = 8  # characters; shorter texts say little and turn up by chance
_READABLE = 0.95  # of the characters of a decoded text
_BASE64 = re.compile(r"(?<![\w+/=-])[A-Za-z0-9+/_-]{12,}={0,2}(?![\w+/=-])")
_HEX = re.compile(r"(?<!\w)(?:(?:0x|\\x)?[0-9a-fA-F]{2}[\s,:]?){8,}(?!\w)")
_PERCENT = re.compile(r"%[0-9a-fA-F]{2}")
_LEAST_PERCENTS = 3  # in a word: two may be a name in an address

_GAP = r"[ \t\n.\-_*/|,·•~+]"
_APART = re.compile(rf"(?<![^\W_])[^\W\d_](?:(?:{_GAP}{{1,4}}[^\W_]){{3,}}|(?:[.\-_*|][^\W_]){{2}})(?![^\W_])")
_LONGEST_WORD = 24
# Words written together, or a long one; not names in code, whose capitals part them.
_RUN = re.compile(r"(?<![^\W_])(?:[A-Za-z][a-z]{15,1999}|[A-Z]{16,2000})(?![^\W_])")
_FEWEST_WORDS, _AVERAGE_WORD = 4, 2.5  # of a run that is taken apart
_UNKNOWN = 9.0  # what a letter costs that belongs to no word, in nats

_LEET = {
    "0": "o", "1": "il", "2": "z", "3": "e", "4": "a", "5": "s", "6": "gb", "7": "t", "8": "b", "9": "g",
    "@": "a", "$": "s", "!": "i", "|": "li", "+": "t", "€": "e", "£": "l", "¥": "y", "(": "c",
}  # fmt: skip
_CHUNK = re.compile(r"\S+")
_NUMBER = re.compile(r"(?<!\S)\d{1,3}(?!\S)")
_LEAST_LEET = 2  # words written with digits, for numbers to be read as words, too
_EDGES = "\"'.,;:?!()[]{}<>*_`"
_MOST_SPELLINGS = 16


class Undisguiser:
    """Needs the words of the language that hidden words are in, the most frequent first."""

    def __init__(self, words: Iterable[str]) -> None:
        ranked = [word for word in words if word.isalpha() and (len(word) > 1 or word in "ai")]
        # A word's probability falls with its rank (Zipf's law), so the rank is all that is needed.
        scale = math.log(max(2, len(ranked)))
        self._costs: dict[str, float] = {}
        for rank, word in enumerate(ranked):
            self._costs.setdefault(word, math.log((rank + 1) * scale))

    def undisguised(self, text: str) -> str | None:
        """A second reading of `text`, whose white space should be as it was written; None if it has none."""
        read = _decoded(text)
        read = _RUN.sub(self._parted, _APART.sub(self._joined, read))
        mended = _CHUNK.sub(self._unleeted, read)
        if mended != read and sum(a != b for a, b in zip(read.split(), mended.split(), strict=False)) >= _LEAST_LEET:
            mended = _NUMBER.sub(self._number_read, mended)
        return mended if mended != text else None

    def segmented(self, letters: str) -> str:
        """`letters` cut into words, the likeliest way."""
        best: list[tuple[float, int]] = [(0.0, 0)]  # by end: cost, begin of the last word
        lower = letters.lower()
        for end in range(1, len(lower) + 1):
            choices = [
                (best[begin][0] + self._cost(lower[begin:end]), begin)
                for begin in range(max(0, end - _LONGEST_WORD), end)
            ]
            best.append(min(choices))
        words: list[str] = []
        end = len(lower)
        while end:
            begin = best[end][1]
            words.append(letters[begin:end])
            end = begin
        return " ".join(reversed(words))

    def _cost(self, word: str) -> float:
        return self._costs.get(word, _UNKNOWN * len(word) + 4.0)

    def _joined(self, match: re.Match[str]) -> str:
        """Letters set apart; where some gaps are wider than others, these part words."""
        gaps = re.findall(rf"{_GAP}+", match[0])
        narrow = min(len(gap) for gap in gaps)
        words, word = [], match[0][0]
        for gap, letter in re.findall(rf"({_GAP}+)([^\W_])", match[0]):
            if len(gap) > narrow:
                words.append(word)
                word = ""
            word += letter
        words.append(word)
        return " ".join(self.segmented(word) for word in words)

    def _parted(self, match: re.Match[str]) -> str:
        """Words written together, if all are known and none too short to be there by chance."""
        run = match[0]
        if run.lower() in self._costs:
            return run
        words = self.segmented(run).split()
        known = all(word.lower() in self._costs for word in words)
        enough = len(words) >= _FEWEST_WORDS and len(run) >= _AVERAGE_WORD * len(words)
        return " ".join(words) if known and enough else run

    def _unleeted(self, match: re.Match[str]) -> str:
        """A word in which digits or signs stand for letters. What is a word as it is, or only ends in them, stays."""
        chunk = match[0]
        core = chunk.strip(_EDGES)
        begin = chunk.find(core)
        # A sign at the edge may be a letter ("$ecret") as well as a mark ("now!"): both are tried.
        for word in dict.fromkeys((core, chunk)):
            spelled = self._spelled(word.lower())
            if spelled is not None:
                offset = begin if word is core else 0
                return chunk[:offset] + spelled + chunk[offset + len(word) :]
        return chunk

    def _number_read(self, match: re.Match[str]) -> str:
        """A number as a word, where there is a frequent one; among other words written so, it is likely one of them."""
        spellings = map("".join, itertools.product(*(_LEET.get(char, char) for char in match[0])))
        return next((word for word in spellings if word in self._costs), match[0])

    def _spelled(self, word: str) -> str | None:
        signs = [index for index, char in enumerate(word) if char in _LEET]
        if not signs or len(word) > _LONGEST_WORD or not any(char.isalpha() for char in word):
            return None
        if any(not char.isalpha() and char not in _LEET for char in word):
            return None
        choices = [_LEET.get(char, char) for char in word]
        for spelling in itertools.islice(itertools.product(*choices), _MOST_SPELLINGS):
            spelled = "".join(spelling)
            if spelled in self._costs and len(spelled) > 1:
                return spelled
        inside = [index for index in signs if 0 < index < len(word) - 1 and word[index].isalnum()]
        return "".join(choice[0] for choice in choices) if len(inside) > 1 else None


def _decoded(text: str) -> str:
    """`text` with what is encoded in it replaced by what it says."""
    for _ in range(_MOST_LAYERS):
        read = _CHUNK.sub(_from_percents, text)
        read = _HEX.sub(_from_hex, read)
        read = _BASE64.sub(_from_base64, read)
        if read == text:
            break
        text = read
    return text


def _from_percents(match: re.Match[str]) -> str:
    if len(_PERCENT.findall(match[0])) < _LEAST_PERCENTS:
        return match[0]
    return _or_same(match[0], urllib.parse.unquote_to_bytes(match[0]))


def _from_hex(match: re.Match[str]) -> str:
    digits = re.sub(r"0x|\\x|[\s,:]", "", match[0])
    space = " " if match[0][-1:].isspace() else ""
    return _or_same(match[0], bytes.fromhex(digits)) + space if len(digits) % 2 == 0 else match[0]


def _from_base64(match: re.Match[str]) -> str:
    blob = match[0].rstrip("=").replace("-", "+").replace("_", "/")
    try:
        data = base64.b64decode(blob + "=" * (-len(blob) % 4), validate=True)
    except binascii.Error:
        return match[0]
    return _or_same(match[0], data)


def _or_same(encoded: str, data: bytes) -> str:
    """What `data` says, if it is readable text."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return encoded
    readable = sum(char.isalnum() or char.isspace() or char in ".,;:!?'\"-()" for char in text)
    return text if len(text) >= _LEAST_DECODED and readable >= _READABLE * len(text) else encoded
