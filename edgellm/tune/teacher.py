"""What a target held likely at each token of its answers, computed anew: nobody keeps it while answering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.speculative.buffer import Record

TOP = 8
"""Tokens whose probabilities are asked for."""

_ROWS = 128  # of a step: each may yield logits, which are large

Likeliest = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Tokens and their probabilities, (places, top) each, the likeliest first."""


class Teacher:
    """The target in llama.cpp. Close it, or use it in a `with`."""

    def __init__(self, model: Model, *, longest: int, threads: int, top: int = TOP) -> None:
        """`longest`: tokens of a record, BOS included, at most; `model` stays the caller's. Raises ModelLoadError."""
        self._vocab, self._top = model.vocab, min(top, model.vocab.n_tokens)
        params = ContextParams(context_tokens=longest, sequences=1, batch_tokens=_ROWS, outputs=_ROWS, threads=threads)
        self._context = Context(model, params)
        self._batch = Batch(_ROWS)

    def likeliest(self, record: Record) -> Likeliest:
        """For each token of the answer what was likeliest there. Raises BackendError.

        Where nothing precedes the answer, not even a BOS, its first token has probabilities of 0.
        """
        sequence, start = [*record.prompt, *record.answer], len(record.prompt)
        if self._vocab.adds_bos and sequence[0] != self._vocab.bos:
            sequence.insert(0, self._vocab.bos)
            start += 1
        tokens = np.zeros((len(record.answer), self._top), np.int32)
        probabilities = np.zeros(tokens.shape, np.float32)
        self._context.clear()
        last = len(sequence) - 1  # the last token is followed by none of the answer
        for first in range(0, last, _ROWS):
            end = min(first + _ROWS, last)
            outputs = min(end - first, end - (start - 1)) if end >= start else 0
            self._batch.clear()
            self._batch.extend(sequence[first:end], first, 0, outputs=outputs)
            self._context.decode(self._batch)
            for place in range(end - outputs, end):
                found = _likeliest(self._context.logits(place - first), self._top)
                tokens[place + 1 - start], probabilities[place + 1 - start] = found
        return tokens, probabilities

    def close(self) -> None:
        """Frees the context."""
        self._context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_written(record: Record) -> Likeliest:
    """As if the target had been sure of each token of the answer: nothing is computed."""
    return np.array(record.answer, np.int32)[:, None], np.ones((len(record.answer), 1), np.float32)


def longest_of(records: Sequence[Record]) -> int:
    """What `Teacher` wants to know of them."""
    return 1 + max(len(record.prompt) + len(record.answer) for record in records)


def _likeliest(logits: NDArray[np.float32], top: int) -> Likeliest:
    """(top,) each."""
    chosen = np.argpartition(logits, -top)[-top:]
    chosen = chosen[np.argsort(-logits[chosen], kind="stable")]
    highest = logits[chosen[0]]
    whole = np.exp(logits - highest).sum(dtype=np.float64)
    return chosen.astype(np.int32), (np.exp(logits[chosen] - highest) / whole).astype(np.float32)
