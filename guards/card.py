"""What stands beside a classifier's weights: its outputs, how its logits become probabilities, where it says no."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

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
class Weights:
    """Of the logits that are added up to the one of `unsafe`: of the network, of the n-grams."""

    network: float  # all layers; the first ones alone where they were enough
    ngrams: float


@dataclass(frozen=True, slots=True)
class Passing:
    """What is harmless without a further look: a window whose early logits of `unsafe` and `jailbreak` are both under
    these, and a sentence, besides its window, whose n-grams' logit is."""

    unsafe: float
    jailbreak: float
    sentence: float


@dataclass(frozen=True, slots=True)
class Handicaps:
    """Taken off the logit of `unsafe`, for the score of a text is that of its worst window, and one of many is more
    likely to be bad by chance."""

    sentence: float  # off that of sentences by themselves
    doubling: float  # for every doubling of a text's windows; ln 2 leaves the text's own prior as it is
    doublings: int  # at most: else padding would hide a request

    def of(self, windows: int) -> float:
        """Off that of each of so many windows of a text."""
        return self.doubling * min(self.doublings, max(0, windows - 1).bit_length())


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Read from `card.json`; everything else in that file is for people."""

    version: str
    outputs: tuple[str, ...]  # of the network, in order: unsafe, jailbreak, categories
    scales: Mapping[str, Scale]  # by output
    thresholds: Mapping[str, float]  # by level, on the probability of `unsafe`
    jailbreak_threshold: float
    foreign: Scale  # of the log-odds of `unsafe` of windows that are not English: they are read badly
    weights: Weights
    foreign_weights: Weights  # in windows that are not English
    passing: Passing
    handicaps: Handicaps
    window_tokens: int  # the first and last token, [CLS] and [SEP], included
    overlap_tokens: int


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


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
            foreign=Scale(**_floats(data["foreign"])),
            weights=Weights(**_floats(data["weights"])),
            foreign_weights=Weights(**_floats(data["foreign_weights"])),
            passing=Passing(**_floats(data["passing"])),
            handicaps=Handicaps(
                float(data["handicaps"]["sentence"]),
                float(data["handicaps"]["doubling"]),
                int(data["handicaps"]["doublings"]),
            ),
            window_tokens=int(data["window_tokens"]),
            overlap_tokens=int(data["overlap_tokens"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GuardModelError(f"the guard's card {file} cannot be read: {error!r}") from None
    if card.outputs[:2] != ("unsafe", "jailbreak") or set(card.outputs) != set(card.scales):
        raise GuardModelError(f"the guard's card {file} names outputs that do not fit: {', '.join(card.outputs)}")
    return card
