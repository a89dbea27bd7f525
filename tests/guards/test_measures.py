"""Figures of a classifier's scores, against what is known of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from guards.measures import Share, auc, calibration_error, over, threshold_at


def test_at_most_the_given_share_of_benign_scores_is_above_the_threshold() -> None:
    benign = np.random.default_rng(0).normal(size=1000)
    for share in (0.0, 0.01, 0.05, 0.5):
        threshold = threshold_at(benign, share)
        assert over(benign, threshold).count == int(share * 1000)
    assert over([0.0] * 10, threshold_at([0.0] * 10, 0.5)).count == 0  # of equal scores all or none are above


def test_wilsons_interval() -> None:
    low, high = Share(5, 10).interval
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))  # Wilson 1927
    assert Share(0, 20).interval[0] == 0.0
    assert math.isnan(Share(0, 0).value)
    assert str(Share(9, 10)).startswith("90.0% (")


def test_auc_is_the_share_of_pairs_in_order() -> None:
    good, bad = [3.0, 2.0, 2.0, 0.5], [1.0, 2.0, 0.0]
    pairs = [(g > b) + 0.5 * (g == b) for g in good for b in bad]
    assert auc(good, bad) == pytest.approx(sum(pairs) / len(pairs))


def test_calibration_error_is_the_mean_gap() -> None:
    assert calibration_error([0.1] * 10 + [0.9] * 10, [True] + [False] * 9 + [True] * 9 + [False]) == pytest.approx(0)
    assert calibration_error([1.0] * 4, [True, True, False, False]) == pytest.approx(0.5)
