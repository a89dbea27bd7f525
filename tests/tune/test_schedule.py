"""The order of examples and the course of the learning rate."""

from __future__ import annotations

import itertools

import pytest

from edgellm.tune.schedule import learning_rate_at, step_examples


def _epoch(number: int, **how: int) -> list[list[int]]:
    return [step_examples(3 * number + step, **how) for step in range(3)]  # type: ignore[arg-type]


def test_each_epoch_takes_all_examples_once_in_an_order_of_its_own() -> None:
    how = {"count": 8, "batch_size": 3, "seed": 5}
    first, second = _epoch(0, **how), _epoch(1, **how)
    assert [len(step) for step in first] == [3, 3, 2]
    for epoch in (first, second):
        assert sorted(itertools.chain(*epoch)) == list(range(8))
    assert first != second
    assert first == _epoch(0, **how)
    assert first != _epoch(0, **how | {"seed": 6})


def test_the_rate_rises_and_falls() -> None:
    rates = [learning_rate_at(step, steps=100, height=2.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5] == 2.0
    assert all(one >= other for one, other in itertools.pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.2, abs=0.01)
    assert [learning_rate_at(step, steps=1, height=2.0) for step in range(1)] == [2.0]
