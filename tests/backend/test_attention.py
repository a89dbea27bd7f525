"""The native attention of a few rows against NumPy, and its promise: a row is the same whatever stands beside it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgellm import _kernels

pytestmark = pytest.mark.skipif(not _kernels.kernels(), reason="this processor has no kernels for attention")

Task = tuple[NDArray[np.float32], NDArray[np.float16], NDArray[np.float16], NDArray[np.float16]]


def _attend(query: NDArray, keys: NDArray, values: NDArray, mask: NDArray, scale: float) -> NDArray[np.float32]:
    halves = (np.ascontiguousarray(a).view(np.uint16) for a in (keys, values, mask))
    return _kernels.attend(np.ascontiguousarray(query), *halves, scale)


def _reference(query: NDArray, keys: NDArray, values: NDArray, mask: NDArray, scale: float) -> NDArray[np.float64]:
    """(rows, heads, value width), in double precision; rows that see nothing give zeros."""
    group = query.shape[1] // keys.shape[1]
    result = np.zeros((*query.shape[:2], values.shape[2]))
    for row in range(query.shape[0]):
        seen = np.flatnonzero(np.isfinite(mask[row]))
        for head in range(query.shape[1] if len(seen) else 0):
            k, v = (a[seen, head // group].astype(np.float64) for a in (keys, values))
            scores = scale * (k @ query[row, head].astype(np.float64)) + mask[row, seen].astype(np.float64)
            weights = np.exp(scores - scores.max())
            result[row, head] = weights @ v / weights.sum()
    return result


def _task(seed: int, rows: int, group: int, kv_heads: int, width: int, value_width: int, cells: int) -> Task:
    random = np.random.default_rng(seed)
    query = random.normal(0, 2, (rows, kv_heads * group, width)).astype(np.float32)
    keys = random.normal(0, 1, (cells, kv_heads, width)).astype(np.float16)
    values = random.normal(0, 1, (cells, kv_heads, value_width)).astype(np.float16)
    hidden = random.random((rows, cells)) < random.choice([0.0, 0.3, 0.95])
    hidden[:, : cells // 64 // 2 * 64] |= random.random() < 0.5  # whole blocks that no row sees
    return query, keys, values, np.where(hidden, -np.inf, 0).astype(np.float16)


@given(
    st.integers(0, 1 << 30),
    st.integers(1, 9),
    st.sampled_from([1, 3, 7]),
    st.integers(1, 3),
    st.sampled_from([8, 64, 80, 128, 256]),
    st.sampled_from([8, 64, 72, 256]),
    st.sampled_from([64, 256, 320, 768]),
)
@settings(max_examples=60, deadline=None)
def test_it_is_attention(
    seed: int, rows: int, group: int, kv_heads: int, width: int, value_width: int, cells: int
) -> None:
    task = _task(seed, rows, group, kv_heads, width, value_width, cells)
    found = _attend(*task, 1 / width**0.5)
    np.testing.assert_allclose(found, _reference(*task, 1 / width**0.5), rtol=2e-5, atol=2e-5)


@given(st.integers(0, 1 << 30), st.integers(2, 9), st.sampled_from([64, 512, 1024]))
@settings(max_examples=40, deadline=None)
def test_a_row_is_the_same_to_the_last_bit_alone_and_among_others(seed: int, rows: int, cells: int) -> None:
    query, keys, values, mask = _task(seed, rows, 3, 2, 64, 64, cells)
    together = _attend(query, keys, values, mask, 0.125)
    for row in range(rows):
        alone = _attend(query[row : row + 1], keys, values, mask[row : row + 1], 0.125)
        np.testing.assert_array_equal(alone[0], together[row])


def test_cells_beyond_those_that_are_seen_change_nothing() -> None:
    query, keys, values, mask = _task(1, 2, 3, 2, 64, 64, 256)
    more = [np.concatenate([a, a[:128]]) for a in (keys, values)]
    hidden = np.full((2, 128), -np.inf, np.float16)
    found = _attend(query, *more, np.concatenate([mask, hidden], axis=1), 0.125)
    np.testing.assert_array_equal(found, _attend(query, keys, values, mask, 0.125))


def test_where_the_cells_lie_changes_nothing() -> None:
    query, keys, values, mask = _task(7, 2, 3, 2, 64, 64, 640)
    mask[:] = 0
    expected = _attend(query, keys, values, mask, 0.125)
    places = np.sort(np.random.default_rng(7).choice(1280, 640, replace=False))
    spread = [np.full((1280, *a.shape[1:]), np.nan, np.float16) for a in (keys, values)]
    hidden = np.full((2, 1280), -np.inf, np.float16)
    for wide, a in zip(spread, (keys, values), strict=True):
        wide[places] = a
    hidden[:, places] = 0
    np.testing.assert_array_equal(_attend(query, *spread, hidden, 0.125), expected)


def test_what_is_no_number_in_a_hidden_cell_is_not_seen() -> None:
    query, keys, values, mask = _task(2, 3, 3, 2, 64, 64, 256)
    mask[:, 70:80] = -np.inf
    expected = _attend(query, keys, values, mask, 0.125)
    keys[70:75], values[72:80] = np.nan, np.inf
    np.testing.assert_array_equal(_attend(query, keys, values, mask, 0.125), expected)


def test_a_row_that_sees_nothing_is_zero() -> None:
    query, keys, values, mask = _task(3, 2, 1, 2, 64, 64, 128)
    mask[1] = -np.inf
    assert not _attend(query, keys, values, mask, 0.125)[1].any()


def test_scores_far_apart_do_not_overflow() -> None:
    query, keys, values, mask = _task(4, 2, 1, 1, 64, 64, 512)
    mask[:] = 0
    query *= 300
    np.testing.assert_allclose(
        _attend(query, keys, values, mask, 1.0), _reference(query, keys, values, mask, 1.0), rtol=1e-4, atol=1e-4
    )


def test_a_bias_is_added_to_the_score() -> None:
    query, keys, values, mask = _task(5, 2, 3, 2, 64, 64, 256)
    mask += np.random.default_rng(5).normal(0, 1, mask.shape).astype(np.float16)
    np.testing.assert_allclose(
        _attend(query, keys, values, mask, 0.125), _reference(query, keys, values, mask, 0.125), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize(
    ("rows", "group", "kv_heads", "width", "cells"), [(2, 1, 1, 60, 64), (2, 1, 1, 264, 64), (2, 1, 1, 64, 100)]
)
def test_shapes_that_are_not_known_are_refused(rows: int, group: int, kv_heads: int, width: int, cells: int) -> None:
    with pytest.raises(ValueError, match="shapes"):
        _attend(*_task(6, rows, group, kv_heads, width, width, cells), 1.0)
