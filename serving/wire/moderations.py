"""POST /v1/moderations: OpenAI's shape, with our categories laid over theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from guards import Category, Verdict
from serving.wire.common import RequestModel, ResponseModel, Text, fault
from serving.wire.guard import GuardReport
from serving.wire.inputs import INPUTS_MAX
from serving.wire.messages import PARTS_MAX, TextPart, text_of

TEXT_CHARS_MAX = 1 << 20
"""Of one text: making it ready is one step of the guard, in which others wait."""

_LEADING = 0.5  # a category of a flagged text is true from this share of the text's score on


def _form(value: Any) -> str:
    """Which form `value` has, by its first item: only that one is then tried, so errors name one expectation."""
    if not isinstance(value, list):
        return "#text"
    return "#parts" if value and isinstance(value[0], Mapping) else "#texts"


_ModerationText = Annotated[Text, Field(max_length=TEXT_CHARS_MAX)]
_ModerationInput = Annotated[
    Annotated[_ModerationText, Tag("#text")]
    | Annotated[list[_ModerationText], Field(fail_fast=True, min_length=1, max_length=INPUTS_MAX), Tag("#texts")]
    | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=PARTS_MAX), Tag("#parts")],
    Discriminator(_form),
]


class ModerationRequest(RequestModel):
    input: _ModerationInput = Field(description="A text, several, or a list of text parts, which are one text.")
    model: Text | None = Field(default=None, max_length=512, description="Accepted and ignored: there is one guard.")

    @property
    def texts(self) -> list[str]:
        """What is to be judged, one result each."""
        if isinstance(self.input, str):
            return [self.input]
        texts = [item for item in self.input if isinstance(item, str)]
        return texts or [text_of([item for item in self.input if isinstance(item, TextPart)])]

    @model_validator(mode="after")
    def _parts_are_not_too_long(self) -> ModerationRequest:
        if any(len(text) > TEXT_CHARS_MAX for text in self.texts):
            raise fault(f"must have at most {TEXT_CHARS_MAX} characters in all", "input")
        return self


class ModerationResult(ResponseModel):
    flagged: bool
    categories: dict[str, bool] = Field(description="OpenAI's; those that a flagged text is flagged for are true.")
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text"]]]
    x_guard: GuardReport = Field(description="Extension. The guard's own finding.")


class ModerationResponse(ResponseModel):
    id: str
    model: str
    results: list[ModerationResult]


def openai_scores(categories: Mapping[Category, float]) -> dict[str, float]:
    """The guard's probabilities by OpenAI's categories, all thirteen. A category of theirs for which the guard has two
    takes the higher where either is enough, the lower where it needs both.

    The guard does not tell apart what OpenAI knows of self-harm, and does not judge `violence/graphic`, which is 0.
    """

    def ours(name: Category) -> float:
        return categories.get(name, 0.0)

    hate, harassment, violence, weapons = ours("hate"), ours("harassment"), ours("violence"), ours("weapons")
    crime, self_harm = ours("crime"), ours("self_harm")
    return {
        "harassment": harassment,
        "harassment/threatening": min(harassment, violence),
        "hate": hate,
        "hate/threatening": min(hate, violence),
        "illicit": max(crime, ours("cyber"), ours("privacy"), ours("deception"), weapons),
        "illicit/violent": max(weapons, min(crime, violence)),
        "self-harm": self_harm,
        "self-harm/intent": self_harm,
        "self-harm/instructions": self_harm,
        "sexual": ours("sexual"),
        "sexual/minors": ours("minors"),
        "violence": violence,
        "violence/graphic": 0.0,
    }


def openai_flags(scores: Mapping[str, float], verdict: Verdict) -> dict[str, bool]:
    """Which of OpenAI's categories a text is flagged for: none, or at least one; a block rule alone is "illicit"."""
    least = _LEADING * verdict.score
    flags = {name: verdict.unsafe and score > 0 and score >= least for name, score in scores.items()}
    if verdict.unsafe and not any(flags.values()):
        flags["illicit"] = True
    return flags


def moderation_result(verdict: Verdict, report: GuardReport) -> ModerationResult:
    """A verdict in OpenAI's shape."""
    scores = openai_scores(verdict.categories)
    return ModerationResult(
        flagged=verdict.unsafe,
        categories=openai_flags(scores, verdict),
        category_scores=scores,
        category_applied_input_types={name: ["text"] for name in scores},
        x_guard=report,
    )
