"""The acceptance predictor learns probabilities, and follows them when they change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.speculative.acceptance import Acceptance


def _trained(chance: float, *, tokens: int, model: Acceptance | None = None) -> Acceptance:
    model = model or Acceptance((0.0, 0.0))
    random = np.random.default_rng(1)
    for value in random.random(tokens):
        model.learn((1.0,), bool(value < chance))
    return model


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_it_learns_a_probability(chance: float) -> None:
    model = _trained(chance, tokens=4000)
    # The last thousand tokens or so count: four standard errors of that mean, and the step size, are below 0.1.
    assert model.probability((1.0,)) == pytest.approx(chance, abs=0.1)


def test_it_tells_evidence_apart() -> None:
    model, random = Acceptance((0.0, 0.0)), np.random.default_rng(2)
    for value in random.random(4000):
        strong = bool(random.integers(0, 2))
        model.learn((float(strong),), bool(value < (0.9 if strong else 0.2)))
    assert model.probability((1.0,)) > 0.75
    assert model.probability((0.0,)) < 0.35


def test_it_follows_a_change() -> None:
    model = _trained(0.95, tokens=5000)
    _trained(0.05, tokens=1500, model=model)
    assert model.probability((1.0,)) < 0.25


@given(st.lists(st.tuples(st.floats(-10, 10), st.booleans()), max_size=200), st.floats(-1e6, 1e6))
def test_it_stays_a_probability(tokens: list[tuple[float, bool]], asked: float) -> None:
    model = Acceptance((0.0, 1.0))
    for value, accepted in tokens:
        model.learn((value,), accepted)
    assert 0.0 < model.probability((asked,)) < 1.0
