"""POST /v1/completions: the request, and the answer, which is also the shape of a chunk."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from serving.wire.common import NULL_IS_DEFAULT, ResponseModel, Text, Usage, fault
from serving.wire.guard import GuardReport
from serving.wire.inputs import Inputs, as_inputs
from serving.wire.sampling import GenerationRequest, TokenCount

BEST_OF_MAX = 20
CHOICES_MAX = 1024
FinishReason = Literal["stop", "length", "content_filter"]


class CompletionRequest(GenerationRequest):
    prompt: Inputs = Field(description="One or more prompts: texts, or token ids.")
    max_tokens: Annotated[TokenCount, NULL_IS_DEFAULT] = Field(default=16, description="Most tokens to generate.")
    suffix: Text | None = Field(
        default=None, description="Text that comes after the answer (models that fill in the middle)."
    )
    echo: Annotated[bool, NULL_IS_DEFAULT] = Field(default=False, description="Put the prompt before the answer.")
    logprobs: int | None = Field(default=None, ge=0, le=5, description="Alternatives to report at each token.")
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=BEST_OF_MAX,
        description="Generate this many and return the n of highest mean log-probability.",
    )

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """The prompts one by one: texts or token ids."""
        return as_inputs(self.prompt)

    @model_validator(mode="after")
    def _count_rules(self) -> CompletionRequest:
        if self.best_of is not None:
            if self.best_of < self.n:
                raise fault("is less than 'n'", "best_of")
            if self.stream and self.best_of > self.n:
                raise fault("greater than 'n' cannot be streamed", "best_of")
        answers = len(self.prompts) * max(self.n, self.best_of or 1)
        if answers > CHOICES_MAX:
            raise fault(f"together with 'n' asks for {answers} answers; the limit is {CHOICES_MAX}", "prompt")
        return self


class CompletionLogprobs(ResponseModel):
    """Parallel lists, one entry a token. An echoed prompt's first token has no log-probability (null)."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int]

    null_sent = frozenset({"top_logprobs"})


class CompletionChoice(ResponseModel):
    """`finish_reason` is null in all but the last chunk of an answer; `x_guard` comes with it."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    x_guard: GuardReport | None = Field(default=None, description="Extension. What the guard found in the prompt.")

    null_sent = frozenset({"logprobs", "finish_reason"})


class Completion(ResponseModel):
    """In a stream with `include_usage`, give `usage=None` in every chunk but the last."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None

    null_sent = frozenset({"system_fingerprint"})
