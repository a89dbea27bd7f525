"""Examples as windows of token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from guard_model.augment import Example
from guards.categories import CATEGORIES
from guards.text import clean

OUTPUTS = ("unsafe", "jailbreak", *CATEGORIES)
WINDOW = 64  # tokens, [CLS] and [SEP] included
OVERLAP = 16
_WHOLE = 0.9  # of what the label comes from must be in a window that is called unsafe


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids with [CLS] and [SEP], and labels."""

    ids: list[int]
    text: str  # cleaned
    labels: tuple[float, ...]  # of OUTPUTS
    known: tuple[float, ...]  # 1 where the label is known, else 0
    focus: str = ""  # what of the text the label `unsafe` comes from, if not the whole


class Encoding:
    """The encoder's own tokenizer."""

    def __init__(self, file: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.begin = self._tokenizer.token_to_id("[CLS]")
        self.end = self._tokenizer.token_to_id("[SEP]")

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens without [CLS] and [SEP], of texts that are `clean`ed here."""
        return [piece.ids for piece in self._pieces(texts)]

    def _pieces(self, texts: Sequence[str]) -> list[_Piece]:
        cleaned = [clean(text) for text in texts]
        found = self._tokenizer.encode_batch(cleaned, add_special_tokens=False)
        return [_Piece(text, each.ids, each.offsets) for text, each in zip(cleaned, found, strict=True)]

    def framed(self, ids: Sequence[int]) -> list[int]:
        """With [CLS] and [SEP]."""
        return [self.begin, *ids, self.end]

    def training_windows(self, examples: Sequence[Example], chance: random.Random) -> list[Window]:
        """One window of each example, at random; where the label comes from a part of the text, one that holds it, or,
        of a harmless text, any."""
        # Character places change when a text is cleaned, so its three pieces are cleaned apart.
        texts: list[str] = []
        for example in examples:
            begin, end = example.focus or (0, len(example.text))
            texts += [example.text[:begin], example.text[begin:end], example.text[end:]]
        pieces = self._pieces(texts)
        found = []
        for index, example in enumerate(examples):
            head, focus, tail = pieces[3 * index : 3 * index + 3]
            size, length = WINDOW - 2, len(head.ids) + len(focus.ids) + len(tail.ids)
            begin, end = 0, min(size, length)
            if length > size:
                low, high = 0, length - size
                if example.unsafe and example.focus is not None:
                    slack = max(0, len(focus.ids) - size) + int((1 - _WHOLE) * min(len(focus.ids), size))
                    low = max(0, min(high, len(head.ids) + len(focus.ids) - size - slack))
                    high = max(low, min(high, len(head.ids) + slack))
                begin = chance.randint(low, high)
                end = begin + size
            ids = [*head.ids, *focus.ids, *tail.ids][begin:end]
            shown, place = [], 0
            for piece in (head, focus, tail):
                shown.append(piece.shown(begin - place, end - place))
                place += len(piece.ids)
            part = shown[1] if example.focus else ""
            found.append(Window(self.framed(ids), " ".join(filter(None, shown)), *_labels(example), part))
        return found


@dataclass(frozen=True, slots=True)
class _Piece:
    """A cleaned text and its tokens."""

    text: str
    ids: list[int]
    places: list[tuple[int, int]]

    def shown(self, begin: int, end: int) -> str:
        """The text of the tokens from `begin` to `end`, which may lie outside."""
        places = self.places[max(0, begin) : max(0, end)]
        return self.text[places[0][0] : places[-1][1]] if places else ""


def _labels(example: Example) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Labels and which of them are known: categories only of unsafe texts whose source tells them; whether a harmless
    question in a jailbreak should be answered is left open, so that the jailbreak itself may count."""
    named = [float(name in example.categories) for name in CATEGORIES]
    known = float(bool(example.unsafe and example.categories))
    answerable = float(example.unsafe or not example.jailbreak)
    return (float(example.unsafe), float(example.jailbreak), *named), (answerable, 1.0, *(known for _ in named))
