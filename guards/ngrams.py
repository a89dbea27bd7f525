"""A linear model of character n-grams, beside the network: it knows spellings, in any script, weighed by TF-IDF.

It makes other mistakes than the network, so that the two together are right more often than either; and the network's
vocabulary is English, so that of other languages the n-grams see more.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from guards.errors import GuardModelError

BITS = 20
"""Features are hashed to so many bits."""

SIZES = range(2, 6)
"""Characters of an n-gram."""

SPAN = 160
"""Characters of a stretch: a request with what qualifies it. What else stands in a window does not thin it out."""

_LEAST = 120  # characters of the last stretch

_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd, near 2**64 / golden ratio (Knuth, volume 3, section 6.4)
_STEP = np.uint64(0xD6E8FEB86659FD93)  # odd, so that no bit is lost from one size to the next


def hashed(text: str) -> list[npt.NDArray[np.int64]]:
    """Of a text that is cleaned, with a space before and after, the features of its n-grams, for each of SIZES an array
    in the order of their first characters. Capitals count as small letters."""
    codes = np.frombuffer(f" {text.lower()} ".encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    codes += np.uint64(1)
    state, found = codes, []
    for size in SIZES:  # each from the one before: they begin with 2
        state = (state[:-1] * _STEP) ^ codes[size - 1 :]
        found.append(((state * _SPREAD) >> np.uint64(64 - BITS)).astype(np.int64))
    return found


class Ngrams:
    """`rarity`: each feature's inverse document frequency, 0 for what was never seen; `weights`: over 0 for what speaks
    for unsafe; `bias`. The logit of a text is `bias` + the sum of rarity times weight over its n-grams, divided by the
    root of the sum of squared rarities."""

    def __init__(self, rarity: npt.NDArray[np.floating], weights: npt.NDArray[np.floating], bias: float) -> None:
        self.rarity = rarity.astype(np.float16)
        self.weights = weights.astype(np.float16)
        self.bias = bias

    @classmethod
    def read(cls, file: Path) -> Ngrams:
        """Raises GuardModelError."""
        try:
            with np.load(file) as found:
                return cls(found["rarity"], found["weights"], float(found["bias"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise GuardModelError(f"the guard's n-grams {file} cannot be read: {error!r}") from None

    def write(self, file: Path) -> None:
        """Half precision, compressed."""
        np.savez_compressed(file, rarity=self.rarity, weights=self.weights, bias=np.float32(self.bias))

    def logits(self, texts: Sequence[str]) -> list[float]:
        """Of windows, each: the highest of the whole and of stretches of SPAN characters. Of a text of which nothing is
        known, the bias. Texts are computed together, for many are short."""
        if not texts:
            return []
        texts = [text.lower() for text in texts]  # which may be longer
        begins, ends, firsts = _stretches([len(text) for text in texts])
        tops, squares = np.zeros((2, len(begins)))
        # With one space between two texts and one more at their ends, n-grams over the border are in no stretch.
        for size, features in zip(SIZES, hashed("  ".join(texts)), strict=True):
            rarity = self.rarity[features].astype(np.float64)
            top = np.concatenate([[0.0], np.cumsum(rarity * self.weights[features])])
            square = np.concatenate([[0.0], np.cumsum(rarity**2)])
            # An n-gram is in a stretch that holds all of its characters.
            last = np.clip(ends - size + 1, 0, len(features))
            first = np.minimum(begins, last)
            tops += top[last] - top[first]
            squares += square[last] - square[first]
        found = np.maximum.reduceat(tops / np.sqrt(np.maximum(squares, 1e-9)), firsts)
        return [self.bias + value for value in found.tolist()]


def _stretches(lengths: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], list[int]]:
    """Of texts that lie one after the other, each with a space before and after: where their stretches begin and end,
    and the place of each text's first stretch among them."""
    begins, ends, firsts = [], [], []
    offset = number = 0
    for characters in lengths:
        length = characters + 2
        inside = np.append(np.arange(0, max(1, length - _LEAST), SPAN // 2), 0)
        until = np.append(np.minimum(inside[:-1] + SPAN, length), length)
        begins.append(inside + offset)
        ends.append(until + offset)
        firsts.append(number)
        offset += length
        number += len(inside)
    return np.concatenate(begins), np.concatenate(ends), firsts
