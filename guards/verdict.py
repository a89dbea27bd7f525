"""What a guard says of a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from guards.categories import Category

Label = Literal["safe", "unsafe"]


@dataclass(frozen=True, slots=True)
class DecidingWindow:
    """The stretch of text with the highest score, as the classifier read it."""

    text: str
    turn: int  # the place of its message in the conversation, from 0; of the last one where it joins several
    undisguised: bool  # whether it was read beneath a disguise
    foreign: bool = False  # whether it is not English, as far as the classifier's vocabulary tells; it counts less
    early_score: float = 0.0  # what the first layers alone make of it


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a text should be answered.

    `score` and `jailbreak_score` are calibrated probabilities; `label` is "unsafe" where `score` is over `threshold`
    or a block rule matched (then `score` is 1).
    """

    label: Label
    score: float
    threshold: float
    jailbreak: bool
    jailbreak_score: float
    window: DecidingWindow | None = None  # None: there was nothing to read
    categories: Mapping[Category, float] = field(default_factory=dict)  # the probability of each: at most `score`
    rule: str | None = None  # the block rule that decided
    milliseconds: float = 0.0

    @property
    def unsafe(self) -> bool:
        """Whether the text should not be answered."""
        return self.label == "unsafe"
