"""Pieces of text and their neighbours as hashed features: what a linear model reads beside the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)  # odd, by distance in the n-gram
_MIX = 0xD6E8FEB86659FD93


def buckets(ids: Sequence[int], *, bits: int) -> npt.NDArray[np.int64]:
    """Buckets (each once, ascending, under 2 ** bits) of the token ids, of their pairs, of pairs with one token
    between, and of their triples."""
    x = np.asarray(ids, dtype=np.uint64) + np.uint64(1)
    a, b, c = (np.uint64(value) for value in _MULTIPLIERS)
    with np.errstate(over="ignore"):
        found = [x * a, x[:-1] * a + x[1:] * b, x[:-2] * b + x[2:] * c, x[:-2] * a + x[1:-1] * b + x[2:] * c]
        hashed = np.concatenate(found)
        hashed ^= hashed >> np.uint64(32)
        hashed *= np.uint64(_MIX)
    return np.unique((hashed >> np.uint64(64 - bits)).astype(np.int64))
