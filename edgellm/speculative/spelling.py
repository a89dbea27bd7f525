"""Bytes to the tokens that spell them exactly: a vocabulary's own tokenisation wherever that is possible.

llama.cpp's tokenizers take text, not bytes: they put a space in front (SentencePiece), read U+2581 as a space, replace
what is not UTF-8, and leave out bytes that the vocabulary lacks. What they give is therefore compared with the bytes.

They also take 40 to 80 µs for one word. Text is cut where no token can lie across, nor a tokenizer's splitter see
across, and what each part was spelled with is remembered: words come again and again.
"""

from __future__ import annotations

import re
import threading
import weakref
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from edgellm.backend.vocab import TokenKind, Vocab

_MEMO_PARTS = 1 << 15  # some 5 MB
_MEMO_PART_BYTES = 64
_ANCHORS = ("\n", "a", "1", ".")
_GAP = 1 << 20  # what a byte that nothing spells costs, in tokens
_lock = threading.Lock()
_spellers: weakref.WeakValueDictionary[int, Speller] = weakref.WeakValueDictionary()
_SAMPLE = """It's the 2nd day: we'd walked 1,234.5 km (all in one go) to "Saint-Malo"; they didn't.

def area(x: float, *, unit="m\\t") -> list[str]:
    # <b>bold</b> text, a/b & c
    return [f"{x ** 2:.3f}", 'ok'] if x >= 0 else None  # done

- item_one\titem Two\r
Ich weiß: naïve café 中文 text, 日本語 too. THE END
"""


def speller_for(vocab: Vocab) -> Speller:
    """The one speller of a vocabulary, while anybody uses it: a drafter's serves all of its targets."""
    with _lock:
        found = _spellers.get(id(vocab))
        if found is None:
            found = _spellers[id(vocab)] = Speller(vocab)
        return found


class Speller:
    """Spells bytes in one vocabulary. For any thread, while the vocabulary's model is open."""

    def __init__(self, vocab: Vocab) -> None:
        self.vocab = vocab
        ends = vocab.end_tokens
        shown = (TokenKind.TEXT, TokenKind.BYTE)
        #: What each token stands for in text; b"" for control tokens, those that end a generation, and unused ones.
        self.pieces: tuple[bytes, ...] = tuple(
            piece if kind in shown and token not in ends else b""
            for token, (piece, kind) in enumerate(zip(vocab.pieces, vocab.kinds, strict=True))
        )
        # Of tokens for the same bytes the first is meant, which is never a byte token if there is another.
        spelling = [token for token, piece in enumerate(self.pieces) if piece]
        spelling.sort(key=lambda token: vocab.kinds[token] is TokenKind.BYTE)
        spelling.sort(key=self.pieces.__getitem__)
        self._order = array("i", spelling)
        self._sorted = [self.pieces[token] for token in spelling]
        #: Whether every byte has a token.
        self.spells_all = all(self.find(bytes([byte])) >= 0 for byte in range(256))
        self._memo: dict[bytes, list[int]] = {}
        self._anchors: tuple[str, ...] = ("",)
        if self.text(vocab.tokenize("a", add_special=False, parse_special=False)) == b" a":
            self._anchors = _ANCHORS
        self._boundary = _boundary(self._sorted)
        sample = _SAMPLE.encode()
        if self.spell(sample) != self._tokenize(_SAMPLE, sample):  # an unusual splitter: it sees across
            self._boundary = _NOWHERE
        self._memo.clear()

    def spell(self, data: bytes) -> list[int] | None:
        """Tokens whose pieces join to `data`, which may begin and end anywhere in a text; None if there are none."""
        tokens = self.spell_most(data)
        return tokens if self.spells_all or self.text(tokens) == data else None

    def spell_most(self, data: bytes) -> list[int]:
        """As `spell`, but bytes that no token stands for are left out."""
        memo, tokens = self._memo, []
        for part in self._boundary.split(data):
            found = memo.get(part)
            tokens += self._spell_part(part) if found is None else found
        return tokens

    def last_boundary(self, data: bytes) -> int:
        """The last place at which `data` can be cut so that both parts are spelled as the whole is; else 0."""
        last = 0
        for match in self._boundary.finditer(data):
            last = match.start()
        return last

    def find(self, piece: bytes) -> int:
        """The token that stands for `piece`; -1 if there is none."""
        at = bisect_left(self._sorted, piece)
        return self._order[at] if at < len(self._sorted) and self._sorted[at] == piece else -1

    def grows(self, token: int) -> bool:
        """Whether a longer token begins as this one does: more text may turn it into another."""
        piece = self.pieces[token]
        at = bisect_right(self._sorted, piece)
        return at < len(self._sorted) and self._sorted[at].startswith(piece)

    def text(self, tokens: Sequence[int]) -> bytes:
        """What `tokens` stand for."""
        pieces = self.pieces
        return b"".join([pieces[token] for token in tokens])

    def tokens_by_piece(self) -> dict[bytes, int]:
        """What `find` finds, for all pieces at once."""
        return dict(zip(reversed(self._sorted), reversed(self._order), strict=True))

    def _spell_part(self, part: bytes) -> list[int]:
        if not part:
            return []
        start, end = whole_characters(part)
        try:
            text = part[start:end].decode()
        except UnicodeDecodeError:
            tokens = self._fewest(part)
        else:
            tokens = self._fewest(part[:start]) + self._tokenize(text, part[start:end]) + self._fewest(part[end:])
        if len(part) <= _MEMO_PART_BYTES:
            if len(self._memo) >= _MEMO_PARTS:
                self._memo.clear()
            self._memo[part] = tokens
        return tokens

    def _tokenize(self, text: str, data: bytes) -> list[int]:
        """The tokenizer's own spelling of `text`, that is `data`, inside a text; the shortest one if it gives none."""
        if not data:
            return []
        for anchor in self._anchors:
            tokens = self.vocab.tokenize(anchor + text, add_special=False, parse_special=False)
            if anchor:  # stands in front, so that the space that the tokenizer adds is not before `text`
                lead, size = 0, len(anchor) + 1
                while size > 0 and lead < len(tokens):
                    size -= len(self.pieces[tokens[lead]])
                    lead += 1
                del tokens[:lead]
            if self.text(tokens) == data:
                return tokens
        return self._fewest(data)

    def _fewest(self, data: bytes) -> list[int]:
        """The fewest tokens, and of these spellings the one whose first tokens are longest; gaps cost most of all."""
        size = len(data)
        cost, choice = [0] * (size + 1), [(-1, 1)] * size  # of what is left from here on; its first token and length
        for start in range(size - 1, -1, -1):
            cost[start] = cost[start + 1] + _GAP
            for end in range(start + 1, size + 1):
                piece = data[start:end]
                at = bisect_left(self._sorted, piece)
                if at == len(self._sorted) or not self._sorted[at].startswith(piece):
                    break
                if len(self._sorted[at]) == len(piece) and cost[end] + 1 <= cost[start]:
                    cost[start], choice[start] = cost[end] + 1, (self._order[at], end - start)
        tokens, start = [], 0
        while start < size:
            token, length = choice[start]
            if token >= 0:
                tokens.append(token)
            start += length
        return tokens


def whole_characters(data: bytes) -> tuple[int, int]:
    """Where `data` begins and ends without the parts of UTF-8 characters that are cut off at its ends.

    What is between may still be invalid.
    """
    start, end = 0, len(data)
    while start < min(3, end) and data[start] & 0xC0 == 0x80:
        start += 1
    return start, max(start, end - incomplete_bytes(data))


def incomplete_bytes(data: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character that goes on: 0 to 3."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # not a continuation
            length = 2 if 0xC2 <= byte < 0xE0 else 3 if 0xE0 <= byte < 0xF0 else 4 if 0xF0 <= byte < 0xF5 else 1
            return back if length > back else 0
    return 0


_NOWHERE = re.compile(rb"(?!)")


def _boundary(pieces: list[bytes]) -> re.Pattern[bytes]:
    """Matches, with no width, where text can be cut: no token lies across, and merges do not reach across.

    The splitters of byte-level BPE also end a match at all of these places, whatever follows, and look no further back:
    before the space of a word, around the newline of a line of text, and between a word and punctuation, but for
    apostrophes. SentencePiece has no splitter, so that its pieces alone decide.
    """
    text = b"\xff\xff".join(pieces)  # bytes that none of the patterns match
    before_space = {*range(ord("!"), ord("~") + 1)} - {found[0] for found in re.findall(rb"([!-~]) ", text)}
    marks = {mark for mark in range(ord("!"), ord("~") + 1) if not chr(mark).isalnum()} - {ord("'")}
    marks -= {found[0] for found in re.findall(rb"[A-Za-z]([!-/:-@\[-`{-~])", text)}
    choices = []
    if before_space:
        choices.append(rb"(?<=[%s])(?= [A-Za-z])" % _class(before_space))
    if marks:
        choices.append(rb"(?<=[A-Za-z])(?=[%s])" % _class(marks))
    if not re.search(rb"[A-Za-z0-9]\n", text):
        choices.append(rb"(?<=[A-Za-z0-9])(?=\n)")
    if not re.search(rb"\n[A-Za-z]", text):
        choices.append(rb"(?<=[!-~]\n)(?=[A-Za-z])")
    return re.compile(b"|".join(choices)) if choices else _NOWHERE


def _class(members: set[int]) -> bytes:
    return b"".join(b"\\x%02x" % member for member in sorted(members))
