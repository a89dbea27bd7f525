"""What stands beside a classifier's weights: its outputs, how its logits become probabilities, where it says no."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from guards.errors import GuardModelError

Level = Literal["strict", "balanced"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True, slots=True)
class Scale:
    """A logit's way to a probability: `sigmoid(slope * logit + bias)` (Platt 1999)."""

    slope: float = 1.0
    bias: float = 0.0

    def log_odds(self, logit: float) -> float:
        return self.slope * logit + self.bias

    def probability(self, logit: float) -> float:
        return sigmoid(self.log_odds(logit))


@dataclass(frozen=True, slots=True)
class Card:
    """Read from `card.json`; everything else in that file is for people."""

    version: str
    outputs: tuple[str, ...]  # of the network, in order: unsafe, jailbreak, categories
    scales: Mapping[str, Scale]  # by output
    thresholds: Mapping[str, float]  # by level, on the probability of `unsafe`
    jailbreak_threshold: float
    foreign_handicap: float  # taken off the log-odds of windows that are not English: they are read badly
    window_tokens: int  # the first and last token, [CLS] and [SEP], included
    overlap_tokens: int


def sigmoid(x: float) -> float:
    """The logistic function, for any float."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def read_card(file: Path) -> Card:
    """Raises GuardModelError."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        card = Card(
            version=str(data["version"]),
            outputs=tuple(data["outputs"]),
            scales={name: Scale(**scale) for name, scale in data["scales"].items()},
            thresholds={level: float(data["thresholds"][level]) for level in LEVELS},
            jailbreak_threshold=float(data["jailbreak_threshold"]),
            foreign_handicap=float(data["foreign_handicap"]),
            window_tokens=int(data["window_tokens"]),
            overlap_tokens=int(data["overlap_tokens"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GuardModelError(f"the guard's card {file} cannot be read: {error!r}") from None
    if card.outputs[:2] != ("unsafe", "jailbreak") or set(card.outputs) != set(card.scales):
        raise GuardModelError(f"the guard's card {file} names outputs that do not fit: {', '.join(card.outputs)}")
    return card
