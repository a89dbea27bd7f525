"""Step times by rows: what was measured at start, and what is seen while running."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.speculative.costs import WIDTHS, StepCosts

MEASURED = {1: 0.020, 2: 0.025, 4: 0.032, 8: 0.050, 16: 0.092}


def test_what_was_measured_is_believed_and_the_rest_lies_between() -> None:
    costs = StepCosts(MEASURED)
    for rows, seconds in MEASURED.items():
        assert costs.seconds(rows) == pytest.approx(seconds)
    assert costs.seconds(7) == pytest.approx((costs.seconds(6) + costs.seconds(8)) / 2)


@given(st.dictionaries(st.sampled_from(WIDTHS), st.floats(1e-4, 10.0)), st.floats(1e-4, 10.0))
def test_more_rows_never_take_less_time(measured: dict[int, float], first: float) -> None:
    costs = StepCosts({**measured, 1: first})
    times = [costs.seconds(rows) for rows in range(1, 600)]
    assert times == sorted(times)


@given(st.lists(st.tuples(st.integers(1, 512), st.floats(1e-6, 100.0)), max_size=60))
def test_nor_after_whatever_was_seen(steps: list[tuple[int, float]]) -> None:
    costs = StepCosts(MEASURED)
    for rows, seconds in steps:
        costs.observe(rows, seconds)
    times = [costs.seconds(rows) for rows in range(1, 600)]
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in itertools.pairwise(times))
    assert times[0] > 0


def test_a_machine_that_becomes_slower_is_followed_at_all_widths() -> None:
    costs = StepCosts(MEASURED)
    for _ in range(100):
        costs.observe(1, 0.040)
    assert costs.seconds(1) == pytest.approx(0.040, rel=0.05)
    assert costs.seconds(8) == pytest.approx(0.100, rel=0.2)


def test_a_wrong_shape_is_mended() -> None:
    costs = StepCosts({1: 0.020, 8: 0.025})
    for _ in range(600):
        costs.observe(1, 0.020)
        costs.observe(8, 0.050)
    assert costs.seconds(8) / costs.seconds(1) == pytest.approx(2.5, rel=0.05)


def test_one_disturbed_step_changes_little() -> None:
    costs = StepCosts(MEASURED)
    costs.observe(1, 5.0)
    assert costs.seconds(1) < 0.023


def test_a_long_prompt_says_nothing_about_answers() -> None:
    costs = StepCosts(MEASURED)
    for _ in range(50):
        costs.observe(512, 10 * costs.seconds(512))
    assert costs.seconds(1) == pytest.approx(0.020)


def test_without_measurements_the_first_step_sets_the_scale() -> None:
    costs = StepCosts()
    assert not costs.known
    costs.observe(1, 0.5)
    assert costs.known
    assert costs.seconds(1) == pytest.approx(0.5)
    assert costs.seconds(4) > 1.5  # cautious: drafts must be very likely before they are tried


def test_what_was_learned_can_begin_another() -> None:
    costs = StepCosts(MEASURED)
    for _ in range(30):
        costs.observe(2, 0.030)
    again = StepCosts(costs.measured())
    assert {rows: again.seconds(rows) for rows in MEASURED} == pytest.approx(
        {rows: costs.seconds(rows) for rows in MEASURED}
    )


def test_an_assumption_is_not_kept_as_if_it_had_been_measured() -> None:
    costs = StepCosts()
    for _ in range(10):
        costs.observe(1, 0.5)
        costs.observe(4, 1.0)
    again = StepCosts(costs.measured())
    assert set(costs.measured()) == {1, 4}
    assert again.uncertain(8)
    assert not again.uncertain(4)


def test_a_width_between_two_that_are_known_lies_straight_between_them() -> None:
    costs = StepCosts(MEASURED)
    assert costs.seconds(3) == pytest.approx((MEASURED[2] + MEASURED[4]) / 2)
    assert costs.seconds(12) == pytest.approx((MEASURED[8] + MEASURED[16]) / 2)
