"""`x_guard`: what the guard found in a prompt, as answers tell it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from guards import Level, Verdict
from serving.wire.common import ResponseModel

_FAILED = "The guard failed on this text; the server's log says more."


class GuardWindow(ResponseModel):
    text: str = Field(description="As the classifier read it.")
    turn: int = Field(description="The place of its message in the conversation, from 0.")
    undisguised: bool = Field(description="Whether it was read beneath an encoding or another disguise.")
    foreign: bool = Field(description="Whether most of it is not English: it is read badly then, and counts less.")


class GuardReport(ResponseModel):
    """Extension. Null throughout, but for `level` and `error`, where the guard failed."""

    label: Literal["safe", "unsafe"] | None = None
    score: float | None = Field(default=None, description="The probability that it should not be answered.")
    threshold: float | None = Field(default=None, description="Scores over it are unsafe.")
    level: Level
    jailbreak: bool | None = Field(default=None, description="Whether it tries to talk the model out of its rules.")
    jailbreak_score: float | None = None
    categories: dict[str, float] | None = Field(default=None, description="The probability of each: at most the score.")
    window: GuardWindow | None = Field(default=None, description="The stretch of text with the highest score.")
    rule: str | None = Field(default=None, description="The block rule that decided.")
    milliseconds: float | None = Field(default=None, description="Time of judging, waiting not counted.")
    error: str | None = None

    null_sent = frozenset(
        {"label", "score", "threshold", "jailbreak", "jailbreak_score", "categories", "window", "rule"}
        | {"milliseconds", "error"}
    )

    @classmethod
    def of(cls, verdict: Verdict | None, level: Level) -> GuardReport:
        """`verdict` None: the guard failed."""
        if verdict is None:
            return cls(level=level, error=_FAILED)
        window = None
        if verdict.window is not None:
            found = verdict.window
            window = GuardWindow(text=found.text, turn=found.turn, undisguised=found.undisguised, foreign=found.foreign)
        return cls(
            label=verdict.label,
            score=verdict.score,
            threshold=verdict.threshold,
            level=level,
            jailbreak=verdict.jailbreak,
            jailbreak_score=verdict.jailbreak_score,
            categories=dict(verdict.categories.items()),
            window=window,
            rule=verdict.rule,
            milliseconds=verdict.milliseconds,
        )
