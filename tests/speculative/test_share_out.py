"""How many drafted tokens are verified, against all the ways there are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.speculative.share_out import share_out

_CHANCES = st.lists(st.lists(st.floats(0.05, 0.99), max_size=4), min_size=1, max_size=3)


def _rate(chances: Sequence[Sequence[float]], counts: Sequence[int], seconds: Sequence[float]) -> float:
    expected = sum(prod(c[: k + 1]) for c, count in zip(chances, counts, strict=True) for k in range(count))
    return (len(chances) + expected) / seconds[len(chances) + sum(counts)]


@given(_CHANCES, st.lists(st.floats(0.01, 1.0), min_size=20, max_size=20))
def test_nothing_is_better_than_what_it_finds(chances: list[list[float]], increments: list[float]) -> None:
    seconds = [1.0]
    for increment in increments:
        seconds.append(seconds[-1] + increment)
    answers = len(chances)
    counts = share_out(chances, answers=answers, rows=answers, room=12, seconds=seconds.__getitem__).counts
    ways = product(*(range(len(chance) + 1) for chance in chances))
    best = max(_rate(chances, way, seconds) for way in ways)
    none = _rate(chances, [0] * answers, seconds)
    if best <= 1.03 * none:
        assert not any(counts)
    else:
        assert _rate(chances, counts, seconds) == pytest.approx(best)


@given(_CHANCES, st.integers(0, 6))
def test_the_room_is_kept(chances: list[list[float]], room: int) -> None:
    counts = share_out(chances, answers=len(chances), rows=len(chances), room=room, seconds=lambda _rows: 1.0).counts
    assert sum(counts) <= room
    assert all(count <= len(chance) for count, chance in zip(counts, chances, strict=True))


def test_a_draft_that_will_fail_is_not_verified() -> None:
    assert share_out([[0.1, 0.9]], answers=1, rows=1, room=8, seconds=lambda rows: 1 + 0.25 * (rows - 1)).counts == [0]


def test_of_two_answers_the_likelier_is_drafted() -> None:
    counts = share_out(
        [[0.3] * 6, [0.9] * 6], answers=2, rows=2, room=3, seconds=lambda rows: 1 + 0.1 * (rows - 1)
    ).counts
    assert counts[1] > counts[0]


def test_a_step_that_reads_a_prompt_is_no_reason_to_draft_more() -> None:
    def seconds(rows: int) -> float:
        return 1 + 0.25 * (rows - 1)

    alone = share_out([[0.6] * 8], answers=1, rows=1, room=8, seconds=seconds)
    beside = share_out([[0.6] * 8], answers=1, rows=257, room=8, seconds=seconds)
    assert alone == beside


def test_where_rows_beyond_a_bend_cost_nothing_the_bend_is_filled() -> None:
    def seconds(rows: int) -> float:
        return 1.0 + (rows > 1) * 0.8  # the second row costs, the others do not

    assert share_out([[0.7] * 7], answers=1, rows=1, room=7, seconds=seconds).counts == [7]
