"""Packing: every token once, no row too long, and as a plain first fit would have it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.tune.coding import TrainingSequence
from edgellm.tune.packing import assign_rows, pack

ROW = 32
lengths = st.lists(st.integers(1, ROW), max_size=60)


def plain_first_fit(lengths: list[int], seed: int) -> list[list[int]]:
    """The slow reference."""
    draw = random.Random(seed)
    order = list(range(len(lengths)))
    draw.shuffle(order)
    rows: list[list[int]] = []
    for index in sorted(order, key=lambda index: -lengths[index]):
        for row in rows:
            if sum(lengths[member] for member in row) + lengths[index] <= ROW:
                row.append(index)
                break
        else:
            rows.append([index])
    draw.shuffle(rows)
    return rows


@given(lengths=lengths, seed=st.integers(0, 2**32))
def test_rows_are_those_of_a_plain_first_fit(lengths: list[int], seed: int) -> None:
    assert assign_rows(lengths, ROW, seed) == plain_first_fit(lengths, seed)


@given(lengths=lengths, seed=st.integers(0, 2**32))
def test_every_token_is_packed_once_and_stays_apart_from_others(lengths: list[int], seed: int) -> None:
    starts = np.cumsum([1, *lengths])
    sequences = [
        TrainingSequence(np.arange(start, start + length, dtype=np.int32), np.ones(length, np.bool_))
        for start, length in zip(starts, lengths, strict=False)
    ]
    rows = pack(sequences, ROW, seed)
    assert rows.tokens.shape[1] == ROW
    assert sorted(rows.tokens[rows.segments > 0].tolist()) == list(range(1, sum(lengths) + 1))
    for tokens, mask, segments, positions in zip(rows.tokens, rows.mask, rows.segments, rows.positions, strict=True):
        padding = segments == 0
        assert not np.stack([tokens, mask, positions])[:, padding].any()
        for segment in range(1, segments.max(initial=0) + 1):
            inside = segments == segment
            assert positions[inside].tolist() == list(range(inside.sum()))
            assert np.all(np.diff(np.flatnonzero(inside)) == 1)
            assert tokens[inside].tolist() == sequences[int(np.searchsorted(starts, tokens[inside][0]))].tokens.tolist()
            assert mask[inside].tolist() == [False] + [True] * (int(inside.sum()) - 1)


def test_the_seed_decides_the_order() -> None:
    lengths = [8] * 40
    assert assign_rows(lengths, ROW, 1) == assign_rows(lengths, ROW, 1) != assign_rows(lengths, ROW, 2)


@pytest.mark.parametrize("length", [0, ROW + 1])
def test_a_length_that_fits_no_row_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="lengths must be 1 to 32"):
        assign_rows([1, length], ROW, 0)
