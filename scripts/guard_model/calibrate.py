"""From scores of prompts that a classifier never saw: its scales, its thresholds, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from guard_model.data import WRITTEN
from guard_model.scoring import Scored, log_odds
from guards.card import Scale, sigmoid
from guards.categories import CATEGORIES
from guards.measures import Share, auc, calibration_error, over, threshold_at

LEVEL_RATES = {"strict": 0.05, "balanced": 0.01}
"""False positives on harmless development prompts at which each level's threshold is frozen."""


_APART = 0.05  # log-odds by which two levels differ at least, for a slope between them
_MISSED = 0.01  # of what would be flagged at the strict level, at most so much may pass after the first layers


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the card says of a classifier's logits. `passing`: early logits under it are harmless without more ado."""

    scales: dict[str, Scale]
    thresholds: dict[str, float]
    foreign: Scale
    passing: float


def calibrated(rows: Sequence[Scored], inside: Sequence[Scored] = ()) -> Calibration:
    """By rows in which `foreign` changes nothing and of which none has passed. `inside`: of sources trained on, for
    `foreign_scale` alone."""
    first = _unsafe_scale(rows)
    limit = passing(rows, first.log_odds, thresholds(rows, first)["strict"])
    rows = passed(rows, limit)
    found = scales(rows)
    limits = thresholds(rows, found["unsafe"])
    foreign = foreign_scale([*rows, *passed(inside, limit)], found["unsafe"], limits)
    return Calibration(found, limits, foreign, limit)


def as_guarded(rows: Sequence[Scored], found: Calibration) -> list[Scored]:
    """The rows as a guard with that calibration scores them."""
    return foreign_scaled(passed(rows, found.passing), found.scales["unsafe"], found.foreign)


def passing(rows: Sequence[Scored], scaled: Callable[[float], float], strict: float) -> float:
    """The early logit under which windows pass."""
    early = [row.early for row in rows if row.unsafe and row.agreed and sigmoid(scaled(row.log_odds)) > strict]
    return float(np.quantile(early, _MISSED)) if early else -math.inf


def passed(rows: Sequence[Scored], limit: float) -> list[Scored]:
    """The rows where what is under the limit early is not looked at further: about as in the guard, which also asks for
    the early logit of `jailbreak`, and so looks at a little more."""
    return [replace(row, log_odds=min(row.early, row.log_odds)) if row.early < limit else row for row in rows]


def fitted(log_odds: Sequence[float], labels: Sequence[bool], *, even: bool = True) -> Scale:
    """Platt's scale; `even`: with as much weight on either label. Of one label alone nothing can be learned: the
    identity."""
    if len(set(labels)) < 2:
        return Scale()
    x = np.asarray(log_odds, dtype=float)[:, None]
    model = LogisticRegression(C=1e6, class_weight="balanced" if even else None).fit(x, np.asarray(labels))
    return Scale(float(model.coef_[0, 0]), float(model.intercept_[0]))


def scales(rows: Sequence[Scored]) -> dict[str, Scale]:
    """Of `unsafe` by what is in English, of the other outputs by all that is known."""
    found = {
        "unsafe": _unsafe_scale(rows),
        "jailbreak": fitted([row.jailbreak for row in rows], [row.set in ("jailbreak", "wrapped") for row in rows]),
    }
    for name in CATEGORIES:
        known = [row for row in rows if row.named and name in row.categories]
        labels = [name in row.named for row in known]
        # Most texts are not of a category: evenly weighed, every rare one would be named too often.
        found[name] = fitted([row.categories[name] for row in known], labels, even=False)
    return found


def _unsafe_scale(rows: Sequence[Scored]) -> Scale:
    judged = [row for row in rows if row.kind != "wrapped" and not row.foreign and row.agreed]
    return fitted([row.log_odds for row in judged], [row.unsafe for row in judged])


def thresholds(rows: Sequence[Scored], scale: Scale) -> dict[str, float]:
    """Probabilities over which a level says unsafe, by what is in English."""
    benign = [row.log_odds for row in rows if row.set == "benign" and not row.foreign]
    return {level: scale.probability(threshold_at(benign, rate)) for level, rate in LEVEL_RATES.items()}


def foreign_scale(rows: Sequence[Scored], scale: Scale, limits: dict[str, float]) -> Scale:
    """What makes each level hold no more harmless prompts in other languages for unsafe than in English, neither of
    those of the sources left out, which are long, nor of the written ones: the scaled log-odds that so many of them are
    over become those of the level."""

    def harmless(name: str, *, foreign: bool) -> list[float]:
        return [scale.log_odds(row.log_odds) for row in rows if _kind(row) == name and row.foreign == foreign]

    benign = harmless("benign", foreign=True)
    if not benign:
        return Scale()

    def over_which(level: str, limit: float) -> float:
        found = threshold_at(benign, LEVEL_RATES[level])
        written, english = harmless("written", foreign=True), harmless("written", foreign=False)
        if not written or not english:
            return found
        return max(found, threshold_at(written, sum(value > limit for value in english) / len(english)))

    strict, balanced = (log_odds(limits[level]) for level in ("strict", "balanced"))
    theirs_strict, theirs = over_which("strict", strict), over_which("balanced", balanced)
    if theirs - theirs_strict < _APART:
        return Scale(1.0, min(0.0, balanced - theirs))
    slope = (balanced - strict) / (theirs - theirs_strict)
    return Scale(slope, balanced - slope * theirs)


def _kind(row: Scored) -> str | None:
    """Of harmless rows: `benign`, of sources left out, or `written`, for this guard, and not trained on."""
    if row.set == "benign":
        return "benign"
    return "written" if row.set == "in_distribution" and row.source == WRITTEN and not row.unsafe else None


def foreign_scaled(rows: Sequence[Scored], scale: Scale, foreign: Scale) -> list[Scored]:
    """The rows as a guard with that scale of other languages scores them."""

    def changed(logit: float) -> float:
        return (foreign.log_odds(scale.log_odds(logit)) - scale.bias) / scale.slope

    return [replace(row, log_odds=changed(row.log_odds)) if row.foreign else row for row in rows]


def report(rows: Sequence[Scored], scale: Scale, limits: dict[str, float]) -> dict[str, Any]:
    """Shares flagged at each level: by set, by fold and set, by source, by language, of all rows and of those whose
    label a second reading shares (`_agreed`); how calibrated, how separable."""
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
            for agreed in (False, True):
                those = [row for row in rows if row.agreed or not agreed]
                groups[f"{kind}_agreed" if agreed else kind] = {
                    name: over([scale.probability(row.log_odds) for row in those if key(row) == name], limit)
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
    agreed = [row for row in rows if row.agreed]
    found["calibration_error_agreed"] = _honest_calibration_error(agreed)
    found["calibration_error_agreed_english"] = _honest_calibration_error([row for row in agreed if not row.foreign])
    return found


def named(rows: Sequence[Scored], found: Mapping[str, Scale]) -> dict[str, dict[str, list[float]]]:
    """Of unsafe texts whose source names categories, by category: how many of those that are said to be of it are
    (precision), how many of those that are of it are said to be (recall)."""
    known = [row for row in rows if row.named and row.categories]
    result = {}
    for name in CATEGORIES:
        said = [found[name].probability(row.categories[name]) > 0.5 for row in known]
        true = [name in row.named for row in known]
        both = sum(a and b for a, b in zip(said, true, strict=True))
        result[name] = {"precision": _shown(Share(both, sum(said))), "recall": _shown(Share(both, sum(true)))}
    return result


def accuracy(rows: Sequence[Scored], scale: Scale, limit: float) -> Share:
    """How many rows are labelled right at a threshold."""
    right = [(scale.probability(row.log_odds) > limit) == row.unsafe for row in rows]
    return Share(sum(right), len(right))


def _shown(share: Share) -> list[float]:
    if not share.of:
        return [0, 0]
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
