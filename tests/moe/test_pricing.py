"""Reading ahead is kept where it pays and dropped where it does not, at little cost for finding out."""

from __future__ import annotations

import random

import pytest

from edgellm.moe.pricing import BLOCK_STEPS, TURNS, PrefetchPrice

STEPS = 2000


def run(price: PrefetchPrice, factor: float, *, reads: int = 5, steps: int = STEPS) -> tuple[float, float]:
    """(seconds of a step, share of steps with reading ahead): steps take `factor` s with it and 1 s without, give or
    take a fifth."""
    draw = random.Random(0)
    total = ahead = 0.0
    for _ in range(steps):
        seconds = factor if price.on else 1.0
        total += seconds
        ahead += price.on
        price.observe(seconds * draw.uniform(0.8, 1.2), 1, reads)
    return total / steps, ahead / steps


@pytest.mark.parametrize("factor", [0.5, 0.8, 0.9])
def test_it_is_kept_where_it_pays(factor: float) -> None:
    seconds, ahead = run(PrefetchPrice(), factor)
    assert ahead > 0.9
    assert seconds < factor + 0.02


@pytest.mark.parametrize("factor", [1.1, 1.3, 2.0])
def test_it_is_dropped_where_it_does_not(factor: float) -> None:
    price = PrefetchPrice()
    run(price, factor, steps=200)  # the first trial
    seconds, ahead = run(price, factor)
    assert ahead < 0.05
    assert seconds < 1.02


def test_a_change_is_found_out() -> None:
    price = PrefetchPrice()
    run(price, 1.3, steps=500)
    assert not price.on
    _, ahead = run(price, 0.7, steps=4000)
    assert ahead > 0.7


def test_without_reads_it_is_off() -> None:
    price = PrefetchPrice()
    _, ahead = run(price, 1.0, reads=0, steps=500)
    assert not price.on
    assert ahead < 0.1


def test_long_steps_are_not_compared() -> None:
    price = PrefetchPrice()
    for _ in range(4 * TURNS * BLOCK_STEPS):
        price.observe(9.0, 256, 5)
    assert price == PrefetchPrice()


def test_steps_are_compared_with_those_of_as_many_rows() -> None:
    """Steps of four rows take twice as long, and come by chance more often with reading ahead, which saves a fifth."""
    price, draw = PrefetchPrice(), random.Random(3)
    ahead = 0
    for _ in range(STEPS):
        rows = 4 if draw.random() < (0.7 if price.on else 0.3) else 1
        price.observe((2.0 if rows == 4 else 1.0) * (0.8 if price.on else 1.0), rows, 5)
        ahead += price.on
    assert ahead > 0.8 * STEPS
