"""Figures of a classifier's scores: plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Z = 1.96  # of a 95 % interval


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many, with Wilson's 95 % interval."""

    count: int
    of: int

    @property
    def value(self) -> float:
        return self.count / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.of:
            return math.nan, math.nan
        share, square = self.value, _Z * _Z / self.of
        middle = (share + square / 2) / (1 + square)
        half = _Z * math.sqrt(share * (1 - share) / self.of + square / (4 * self.of)) / (1 + square)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({low:.1%}-{high:.1%})"


def threshold_at(benign: Sequence[float], false_positives: float) -> float:
    """The least threshold which at most this share of benign scores exceed."""
    ordered = np.sort(np.asarray(benign))[::-1]
    return float(ordered[min(len(ordered) - 1, int(false_positives * len(ordered)))])


def over(scores: Sequence[float], threshold: float) -> Share:
    """How many scores exceed the threshold."""
    return Share(int((np.asarray(scores) > threshold).sum()), len(scores))


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The probability that a positive scores above a negative (ties count half)."""
    both = np.concatenate([positive, negative])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    mine = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(mine / (len(positive) * len(negative))) if len(positive) and len(negative) else math.nan


def calibration_error(
    probabilities: Sequence[float],
    labels: Sequence[bool],
    bins: int = 15,
    weights: Sequence[float] | npt.NDArray[np.float64] | None = None,
) -> float:
    """Expected calibration error over bins of equal width (Naeini et al. 2015; Guo et al. 2017, section 2). `weights`:
    how much each text counts (default: all alike)."""
    p, y = np.asarray(probabilities), np.asarray(labels, dtype=float)
    w = np.ones(len(p)) if weights is None else np.asarray(weights, dtype=float)
    place = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs((w * (p - y))[place == index].sum()) for index in range(bins)]
    return float(sum(gaps) / w.sum())
