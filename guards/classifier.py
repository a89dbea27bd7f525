"""The network: text in, logits of its windows out. ONNX Runtime on one thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

from guards.card import Card, read_card
from guards.errors import GuardModelError
from guards.windows import windows

Logits = npt.NDArray[np.float32]

_FOREIGN = 0.3  # of a window's words: 1 in 100 English prompts has more in pieces, 1 in 20 of other languages fewer
_DOUBT = 2.0  # whole words that a window is credited with
_UNKNOWN = "[UNK]"
_BATCH = 4  # windows computed together: more are not faster on one core, and the first verdicts would wait for them


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a text."""

    text: str
    ids: tuple[int, ...]  # with [CLS] and [SEP]
    foreign: bool = False  # mostly of pieces of words that the vocabulary lacks: not English, most likely


class Classifier:
    """The files in a directory: `model.onnx` (input `ids`: (windows, tokens) int64, without padding; output:
    (windows, outputs) float32), `tokenizer.json` (Hugging Face's tokenizers), `card.json`."""

    def __init__(self, folder: Path) -> None:
        """Raises GuardModelError."""
        self.card: Card = read_card(folder / "card.json")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._session = onnxruntime.InferenceSession(
                str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # both libraries raise bare exceptions of their own
            raise GuardModelError(f"the guard's model in {folder} cannot be loaded: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        begin, end = (self._tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
        width = self._session.get_outputs()[0].shape[-1]
        if begin is None or end is None or width != len(self.card.outputs):
            raise GuardModelError(f"the guard's files in {folder} do not fit together")
        self._begin, self._end = begin, end
        self._begins, self._strange, self._goes_on = self._kinds()

    def _kinds(self) -> tuple[npt.NDArray[np.bool_], ...]:
        """By token id: whether it begins a word, whether it begins one of no English, whether it goes on a word."""
        vocabulary = self._tokenizer.get_vocab()
        begins, strange, goes_on = np.zeros((3, max(vocabulary.values()) + 1), dtype=np.bool_)
        for entry, number in vocabulary.items():
            begins[number] = entry.isalpha() or entry == _UNKNOWN
            strange[number] = begins[number] and (not entry.isascii() or entry == _UNKNOWN)
            goes_on[number] = entry.startswith("##")
        return begins, strange, goes_on

    def _is_foreign(self, ids: Sequence[int]) -> bool:
        """Whether many words are strange or in pieces. A rare word or two make no English question foreign."""
        picked = np.asarray(ids)
        begins, strange = self._begins[picked], self._strange[picked]
        broken = np.append(self._goes_on[picked[1:]], False) & begins
        return bool((broken | strange).sum() >= _FOREIGN * (begins.sum() + _DOUBT))

    def words(self) -> list[str]:
        """The whole words of the vocabulary, the most frequent first (the order of a WordPiece vocabulary)."""
        vocabulary = self._tokenizer.get_vocab()
        return sorted((word for word in vocabulary if word.isalpha()), key=vocabulary.__getitem__)

    def count(self, text: str) -> int:
        """Tokens of a text that is cleaned."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def windows(self, text: str) -> list[Window]:
        """Of a text that is cleaned. Empty for a text without tokens."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if not ids:
            return []
        spans = windows(len(ids), size=self.card.window_tokens - 2, overlap=self.card.overlap_tokens)
        return [
            Window(
                text[offsets[begin][0] : offsets[end - 1][1]],
                (self._begin, *ids[begin:end], self._end),
                self._is_foreign(ids[begin:end]),
            )
            for begin, end in spans
        ]

    def logits(self, found: Sequence[Window]) -> Iterator[tuple[Sequence[Window], Logits]]:
        """Windows of one text, a few at a time, each time with their logits (windows, outputs)."""
        for begin in range(0, len(found), _BATCH):
            batch = found[begin : begin + _BATCH]
            ids = np.array([window.ids for window in batch], dtype=np.int64)  # of one length, as `windows` makes them
            yield batch, self._session.run(None, {"ids": ids})[0]
