"""Fits the linear model of character n-grams to the windows that the encoder is trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from guard_model.encoding import Window
from guards.ngrams import BITS, SPAN, Ngrams, hashed

_PENALTY = 4.0  # scikit-learn's C
_LEAST = 2  # texts that a feature must be in
_STRETCHES = 1  # of a longer harmless window, which is harmless in all its parts


def fitted(windows: Sequence[Window], seed: int) -> Ngrams:
    """Of the windows whose label `unsafe` is known, and of stretches of the harmless ones. Labels weigh the same."""
    texts = list(_texts(windows, random.Random(seed)))
    places, columns, counts = [0], [], []
    for text, _ in texts:
        found, often = np.unique(np.concatenate(hashed(text)), return_counts=True)
        columns.append(found.astype(np.int32))
        counts.append(often.astype(np.float32))
        places.append(places[-1] + len(found))
    found, often = np.concatenate(columns), np.concatenate(counts)
    del columns, counts
    frequency = np.bincount(found, minlength=1 << BITS)
    rarity = np.where(frequency >= _LEAST, np.log((1 + len(texts)) / (1 + frequency)) + 1, 0).astype(np.float32)
    shape = (len(texts), 1 << BITS)
    squares = csr_matrix((often * rarity[found] ** 2, found, places), shape=shape).sum(1)
    lengths = np.sqrt(np.maximum(np.asarray(squares).ravel(), 1e-9)).astype(np.float32)
    x = csr_matrix((often * rarity[found] / np.repeat(lengths, np.diff(places)), found, places), shape=shape)
    model = LogisticRegression(C=_PENALTY, solver="liblinear", class_weight="balanced", random_state=0)
    model.fit(x, [unsafe for _, unsafe in texts])
    return Ngrams(rarity, model.coef_[0], float(np.asarray(model.intercept_).ravel()[0]))


def _texts(windows: Sequence[Window], chance: random.Random) -> Iterator[tuple[str, bool]]:
    for window in windows:
        if not window.known[0]:
            continue
        unsafe = window.labels[0] > 0
        jailbreak = window.labels[1] > 0  # what is around the question speaks against it, too
        yield (window.focus if unsafe and window.focus and not jailbreak else window.text), unsafe
        if not unsafe and len(window.text) > SPAN:
            for _ in range(_STRETCHES):
                begin = chance.randrange(len(window.text) - SPAN)
                yield window.text[begin : begin + SPAN], False
