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
from guards.windows import windows

OUTPUTS = ("unsafe", "jailbreak", *CATEGORIES)
WINDOW = 64  # tokens, [CLS] and [SEP] included
OVERLAP = 24
_WHOLE = 0.9  # of what the label comes from must be in a window that is called unsafe


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids with [CLS] and [SEP], and labels."""

    ids: list[int]
    labels: tuple[float, ...]  # of OUTPUTS
    known: tuple[float, ...]  # 1 where the label is known, else 0


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
        cleaned = [clean(text) for text in texts]
        return [found.ids for found in self._tokenizer.encode_batch(cleaned, add_special_tokens=False)]

    def framed(self, ids: Sequence[int]) -> list[int]:
        """With [CLS] and [SEP] around."""
        return [self.begin, *ids, self.end]

    def windows(self, ids: Sequence[int]) -> list[list[int]]:
        """All windows of a text, as the guard reads it."""
        spans = windows(len(ids), size=WINDOW - 2, overlap=OVERLAP)
        return [self.framed(ids[begin:end]) for begin, end in spans]

    def training_windows(self, examples: Sequence[Example], chance: random.Random) -> list[Window]:
        """One window of each example, at random; where the label comes from a part of the text, one that holds it, or,
        of a harmless text, any."""
        # Character places change when a text is cleaned, so its three pieces are cleaned apart.
        pieces: list[str] = []
        for example in examples:
            begin, end = example.focus or (0, len(example.text))
            pieces += [example.text[:begin], example.text[begin:end], example.text[end:]]
        ids = self.ids(pieces)
        found = []
        for index, example in enumerate(examples):
            head, focus, tail = ids[3 * index : 3 * index + 3]
            tokens = [*head, *focus, *tail]
            spans = windows(len(tokens), size=WINDOW - 2, overlap=OVERLAP)
            if len(spans) > 1:
                size = WINDOW - 2
                low, high = 0, len(tokens) - size
                if example.unsafe and example.focus is not None:
                    slack = max(0, len(focus) - size) + int((1 - _WHOLE) * min(len(focus), size))
                    low = max(0, min(high, len(head) + len(focus) - size - slack))
                    high = max(low, min(high, len(head) + slack))
                begin = chance.randint(low, high)
                tokens = tokens[begin : begin + size]
            found.append(Window(self.framed(tokens), *_labels(example)))
        return found


def _labels(example: Example) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Labels and which of them are known: categories only of unsafe texts whose source tells them; whether a harmless
    question in a jailbreak should be answered is left open, so that the jailbreak itself may count."""
    named = [float(name in example.categories) for name in CATEGORIES]
    known = float(bool(example.unsafe and example.categories))
    answerable = float(example.unsafe or not example.jailbreak)
    return (float(example.unsafe), float(example.jailbreak), *named), (answerable, 1.0, *(known for _ in named))
