"""From scores of prompts that a classifier never saw: its scales, its thresholds, and how good it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from guard_model.scoring import Scored, log_odds
from guards.card import Scale, sigmoid
from guards.categories import CATEGORIES
from guards.measures import Share, auc, calibration_error, over, threshold_at

LEVEL_RATES = {"strict": 0.05, "balanced": 0.01}
"""False positives on harmless development prompts at which each level's threshold is frozen."""


def fitted(log_odds: Sequence[float], labels: Sequence[bool]) -> Scale:
    """Platt's scale, with as much weight on either label. Of one label alone nothing can be learned: the identity."""
    if len(set(labels)) < 2:
        return Scale()
    x = np.asarray(log_odds, dtype=float)[:, None]
    model = LogisticRegression(C=1e6, class_weight="balanced").fit(x, np.asarray(labels))
    return Scale(float(model.coef_[0, 0]), float(model.intercept_[0]))


def scales(rows: Sequence[Scored]) -> dict[str, Scale]:
    """Of every output, by what is in English."""
    judged = [row for row in rows if row.kind != "wrapped" and not row.foreign]
    found = {
        "unsafe": fitted([row.log_odds for row in judged], [row.unsafe for row in judged]),
        "jailbreak": fitted([row.jailbreak for row in rows], [row.set in ("jailbreak", "wrapped") for row in rows]),
    }
    for name in CATEGORIES:
        known = [row for row in rows if row.named and name in row.categories]
        found[name] = fitted([row.categories[name] for row in known], [name in row.named for row in known])
    return found


def thresholds(rows: Sequence[Scored], scale: Scale) -> dict[str, float]:
    """Probabilities over which a level says unsafe, by what is in English."""
    benign = [row.log_odds for row in rows if row.set == "benign" and not row.foreign]
    return {level: scale.probability(threshold_at(benign, rate)) for level, rate in LEVEL_RATES.items()}


def foreign_handicap(rows: Sequence[Scored], scale: Scale, limits: dict[str, float]) -> float:
    """What is taken off the scaled log-odds of other languages, for the balanced level to hold as many of their
    harmless prompts for unsafe."""
    benign = [scale.log_odds(row.log_odds) for row in rows if row.set == "benign" and row.foreign]
    if not benign:
        return 0.0
    return max(0.0, threshold_at(benign, LEVEL_RATES["balanced"]) - log_odds(limits["balanced"]))


def handicapped(rows: Sequence[Scored], scale: Scale, handicap: float) -> list[Scored]:
    """The rows as a guard with that handicap scores them."""
    return [replace(row, log_odds=row.log_odds - handicap / scale.slope) if row.foreign else row for row in rows]


def report(rows: Sequence[Scored], scale: Scale, limits: dict[str, float]) -> dict[str, Any]:
    """Shares flagged at each level: by set, by fold and set, by source, by language; how calibrated, how separable."""
    found: dict[str, Any] = {"levels": {}}
    for level, limit in limits.items():
        groups: dict[str, dict[str, Share]] = {}
        for kind, key in (
            ("set", lambda row: row.set),
            ("fold", lambda row: f"{row.fold}/{row.set}"),
            ("source", lambda row: f"{row.set}/{row.source}"),
            ("language", lambda row: f"{row.set}/{row.lang}"),
            ("foreign", lambda row: f"{row.set}/{'foreign' if row.foreign else 'english'}"),
        ):
            names = sorted({key(row) for row in rows})
            groups[kind] = {
                name: over([scale.probability(row.log_odds) for row in rows if key(row) == name], limit)
                for name in names
            }
        found["levels"][level] = {
            kind: {name: _shown(share) for name, share in shares.items()} for kind, shares in groups.items()
        }
    by_set = {name: [row.log_odds for row in rows if row.set == name] for name in {row.set for row in rows}}
    for positive in ("direct", "jailbreak"):
        for negative in ("benign", "hard_negative"):
            if by_set.get(positive) and by_set.get(negative):
                found[f"auc_{positive}_{negative}"] = round(auc(by_set[positive], by_set[negative]), 4)
    found["calibration_error"] = _honest_calibration_error(rows)
    return found


def accuracy(rows: Sequence[Scored], scale: Scale, limit: float) -> Share:
    """How many rows are labelled right at a threshold."""
    right = [(scale.probability(row.log_odds) > limit) == row.unsafe for row in rows]
    return Share(sum(right), len(right))


def _shown(share: Share) -> list[float]:
    low, high = share.interval
    return [share.count, share.of, round(share.value, 4), round(low, 4), round(high, 4)]


def _honest_calibration_error(rows: Sequence[Scored]) -> float | None:
    """Of probabilities whose scale was fitted without the fold that they are of; None with one fold. Labels weigh
    the same."""
    judged = [row for row in rows if row.kind != "wrapped"]
    probabilities: list[float] = []
    labels: list[bool] = []
    for fold in sorted({row.fold for row in judged}):
        others = [row for row in judged if row.fold != fold]
        if len({row.unsafe for row in others}) < 2:
            return None
        scale = fitted([row.log_odds for row in others], [row.unsafe for row in others])
        mine = [row for row in judged if row.fold == fold]
        probabilities += [sigmoid(scale.log_odds(row.log_odds)) for row in mine]
        labels += [row.unsafe for row in mine]
    weights = np.where(labels, 0.5 / max(1, sum(labels)), 0.5 / max(1, len(labels) - sum(labels)))
    return round(calibration_error(probabilities, labels, weights=weights), 4)
