"""The network and the n-grams beside it: text in, logits of its windows out. ONNX Runtime on one thread.

The network is in two parts. The first layers have a head of their own; only windows that this head does not find
plainly harmless go through the other layers.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

from guards.card import Card, read_card
from guards.errors import GuardModelError
from guards.ngrams import Ngrams
from guards.recent import Recent
from guards.windows import sentences, windows

Outputs = npt.NDArray[np.float32]

_FOREIGN = 0.3  # of a window's words: 1 in 100 English prompts has more in pieces, 1 in 20 of other languages fewer
_DOUBT = 2.0  # whole words that a window is credited with
_UNKNOWN = "[UNK]"
_REMEMBERED = 8192  # texts whose n-grams' logit is kept
_SENTENCES = 100  # that are looked at in one go
_SHORTEST = 4  # tokens of a sentence that is judged by itself
_BATCH = 4  # windows computed together: more are not faster on one core, and the first verdicts would wait for them


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a text."""

    text: str
    ids: tuple[int, ...]  # with [CLS] and [SEP]
    foreign: bool = False  # mostly of pieces of words that the vocabulary lacks: not English, most likely
    sentence: bool = False  # by itself, beside the window that it stands in
    handicap: float = 0.0  # off its logit of `unsafe`, for those that it stands beside


@dataclass(frozen=True, slots=True)
class Logits:
    """Of a window, in the order of the card's outputs, n-grams counted in. `early`: of the first layers; `late`: of
    all, None where the first were enough."""

    early: Outputs
    late: Outputs | None

    @property
    def last(self) -> Outputs:
        """What counts."""
        return self.early if self.late is None else self.late


class Classifier:
    """The files in a directory: `first.onnx` (input `ids`: (windows, tokens) int64, without padding; outputs `states`:
    (windows, tokens, width), `logits`: (windows, outputs), float32), `rest.onnx` (input `states`, output `logits`),
    `ngrams.npz`, `tokenizer.json` (Hugging Face's tokenizers), `card.json`."""

    def __init__(self, folder: Path) -> None:
        """Raises GuardModelError."""
        self.card: Card = read_card(folder / "card.json")
        self._ngrams = Ngrams.read(folder / "ngrams.npz")
        self._known: Recent[str, float] = Recent(_REMEMBERED)
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._first, self._rest = (_session(folder / name) for name in ("first.onnx", "rest.onnx"))
        except Exception as error:  # both libraries raise bare exceptions of their own
            raise GuardModelError(f"the guard's model in {folder} cannot be loaded: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        begin, end = (self._tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
        widths = {self._first.get_outputs()[1].shape[-1], self._rest.get_outputs()[0].shape[-1]}
        if begin is None or end is None or widths != {len(self.card.outputs)}:
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

    def _ngram_logits(self, texts: Sequence[str]) -> list[float]:
        """Those of sentences are asked for twice, and again each time that a conversation goes on."""
        found = {text: self._known.get(text) for text in texts}
        new = [text for text, logit in found.items() if logit is None]
        for text, logit in zip(new, self._ngrams.logits(new), strict=True):
            found[text] = logit
            self._known.keep(text, logit, text)
        return [cast(float, found[text]) for text in texts]

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

    def windows(self, text: str) -> Iterator[Window | None]:
        """Of a text that is cleaned. Of a text without tokens, none. Of several sentences, those whose n-grams are not
        plainly harmless are windows by themselves, too: what stands beside them does not count then. None now and then
        where many are: time for others."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if not ids:
            return
        size = self.card.window_tokens - 2
        spans = windows(len(ids), size=size, overlap=self.card.overlap_tokens)
        handicap = self.card.handicaps.of(len(spans))
        for begin, end in spans:
            yield self._window(text, ids, offsets, begin, end, handicap)
        places = sentences(text)
        if len(places) == 1:
            return
        starts = [begin for begin, _ in offsets]
        for first in range(0, len(places), _SENTENCES):
            found = []
            for place in places[first : first + _SENTENCES]:
                begin, end = (bisect.bisect_left(starts, character) for character in place)
                if _SHORTEST <= end - begin <= size:
                    found.append(self._window(text, ids, offsets, begin, end, handicap, sentence=True))
            logits = self._ngram_logits([window.text for window in found])
            yield from (
                window for window, logit in zip(found, logits, strict=True) if logit > self.card.passing.sentence
            )
            if first + _SENTENCES <= len(places):
                yield None

    def _window(
        self,
        text: str,
        ids: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        begin: int,
        end: int,
        handicap: float,
        *,
        sentence: bool = False,
    ) -> Window:
        shown = text[offsets[begin][0] : offsets[end - 1][1]]
        if sentence:
            handicap += self.card.handicaps.sentence
        framed = (self._begin, *ids[begin:end], self._end)
        return Window(shown, framed, self._is_foreign(ids[begin:end]), sentence, handicap)

    def logits(self, found: Sequence[Window]) -> Iterator[tuple[Sequence[Window], list[Logits]]]:
        """Windows of one text, a few at a time, each time with their logits."""
        begin = 0
        while begin < len(found):
            end = begin + 1
            # Without padding, only windows of one length can be computed together.
            while end < min(begin + _BATCH, len(found)) and len(found[end].ids) == len(found[begin].ids):
                end += 1
            batch = found[begin:end]
            yield batch, self._of(batch)
            begin = end

    def _of(self, batch: Sequence[Window]) -> list[Logits]:
        ids = np.array([window.ids for window in batch], dtype=np.int64)
        states, early = self._first.run(None, {"ids": ids})
        weights = [self.card.foreign_weights if window.foreign else self.card.weights for window in batch]
        of_network, of_ngrams = np.array([(each.network, each.ngrams) for each in weights]).T
        ngrams = of_ngrams * self._ngram_logits([window.text for window in batch])
        ngrams -= [window.handicap for window in batch]
        early[:, 0] = of_network * early[:, 0] + ngrams  # as if all layers said the same
        limits = self.card.passing
        doubtful = np.flatnonzero((early[:, 0] >= limits.unsafe) | (early[:, 1] >= limits.jailbreak))
        late: dict[int, Outputs] = {}
        if len(doubtful):
            (rows,) = self._rest.run(None, {"states": states[doubtful]})
            rows[:, 0] = of_network[doubtful] * rows[:, 0] + ngrams[doubtful]
            late = dict(zip(doubtful.tolist(), rows, strict=True))
        return [Logits(row, late.get(index)) for index, row in enumerate(early)]


def _session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
