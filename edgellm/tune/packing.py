"""Sequences packed into rows of one length, so that little of a batch is padding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm.tune.coding import TrainingSequence


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """All arrays are (rows, row_tokens). Attention must stay within a segment; `mask` marks tokens to predict.

    Padding has token 0, segment 0, position 0 and no mask. Segments count from 1 in each row, positions from 0 in each
    segment. The first token of a segment is never marked: nothing in its row precedes it.
    """

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]
    segments: NDArray[np.int32]
    positions: NDArray[np.int32]


def assign_rows(lengths: Sequence[int], row_tokens: int, seed: int) -> list[list[int]]:
    """Which sequences (indices into `lengths`, in tokens) share a row: first-fit decreasing, at most 11/9 of the fewest
    rows and a bit (Johnson 1973). The same seed gives the same rows in the same order.

    Sequences of one length, and the rows, come in an order drawn by `seed`. Raises ValueError if one is too long.
    """
    if any(not 0 < length <= row_tokens for length in lengths):
        raise ValueError(f"lengths must be 1 to {row_tokens} tokens")
    draw = random.Random(seed)  # noqa: S311 (an order, not a secret)
    order = list(range(len(lengths)))
    draw.shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    rooms = _Rooms(len(lengths), row_tokens)
    rows: list[list[int]] = []
    for index in order:
        row = rooms.take(lengths[index])
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
    draw.shuffle(rows)
    return rows


class _Rooms:
    """Free tokens of up to `count` rows in a tree whose nodes know the most below them: a first fit in log(count)."""

    def __init__(self, count: int, row_tokens: int) -> None:
        self._leaves = 1 << max(count - 1, 0).bit_length()
        self._most = [row_tokens] * (2 * self._leaves)

    def take(self, length: int) -> int:
        """The first row with room for `length`, which it then lacks."""
        node = 1
        while node < self._leaves:
            node = 2 * node if self._most[2 * node] >= length else 2 * node + 1
        row = node - self._leaves
        self._most[node] -= length
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return row


def pack(sequences: Sequence[TrainingSequence], row_tokens: int, seed: int) -> PackedRows:
    """Rows of `row_tokens` tokens that hold every sequence once, each whole. Raises ValueError if one is too long."""
    rows = assign_rows([len(sequence.tokens) for sequence in sequences], row_tokens, seed)
    shape = (len(rows), row_tokens)
    packed = PackedRows(
        np.zeros(shape, np.int32), np.zeros(shape, np.bool_), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    )
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, 1):
            sequence = sequences[index]
            place = np.s_[row, start : start + len(sequence.tokens)]
            packed.tokens[place], packed.mask[place] = sequence.tokens, sequence.mask
            packed.segments[place] = segment
            packed.positions[place] = np.arange(len(sequence.tokens))
            packed.mask[row, start] = False
            start += len(sequence.tokens)
    return packed
