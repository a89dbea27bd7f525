"""What all wire types share: the two base classes, free-form JSON, faults that name a field, usage counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from edgellm.engine.types import Usage as EngineUsage


def fault(message: str, param: str | None = None) -> PydanticCustomError:
    """An error for a validator to raise; `param` is the path of the faulty field below the validated object."""
    return PydanticCustomError("fault", "{message}", {"message": message, "param": param})


# Union branches are tagged with names that start with "#", so that the path of an error can leave them out.


class _NullIsDefault:
    """Annotation: `null` stands for the default (RequestModel drops it), so the JSON schema allows it too."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"type": "null"}]}


NULL_IS_DEFAULT = _NullIsDefault()


def _sound_json(value: dict[str, Any]) -> dict[str, Any]:
    """Python's JSON parser lets NaN and lone surrogates through; neither can be sent on as JSON."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise fault("has a string that is not valid Unicode (a lone surrogate)") from None
    except ValueError:
        raise fault("has a number that JSON cannot express (NaN or Infinity)") from None
    except RecursionError:
        raise fault("is nested too deeply") from None
    return value


def _sound_text(value: str) -> str:
    """Python's JSON parser lets lone surrogates through; no tokenizer and no answer could take them."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise fault("must be valid Unicode, but has a lone surrogate") from None
    return value


Text = Annotated[str, AfterValidator(_sound_text)]
"""Any string of a request: valid Unicode."""

JsonObject = Annotated[dict[str, Any], AfterValidator(_sound_json)]
"""A free-form JSON object: any keys, finite numbers, valid Unicode."""


class WirePart(BaseModel):
    """Base of everything inside a request. Unknown fields are ignored; known ones are never coerced.

    Lists are `fail_fast`: an error for each of a million faulty items would take gigabytes.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True, populate_by_name=True)


class RequestModel(WirePart):
    """Base of a whole request body. A field that is null counts as not given, as it does at OpenAI."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {name: value for name, value in data.items() if value is not None}
        return data


class ResponseModel(BaseModel):
    """Base of every answer, serialised by `to_json`.

    OpenAI sends some nulls and leaves other fields out. Here, a field that was not set is left out, unless it has a
    default other than None (constants such as `object`) or is listed in `null_sent` (then it is sent as null).
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True)

    null_sent: ClassVar[frozenset[str]] = frozenset()
    _always_sent: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        constants = {
            name for name, info in cls.model_fields.items() if not info.is_required() and info.default is not None
        }
        cls._always_sent = cls.null_sent | constants

    def model_post_init(self, context: Any, /) -> None:
        self.__pydantic_fields_set__.update(self._always_sent)

    def to_json(self) -> bytes:
        """The body as it goes over the wire: compact UTF-8 JSON."""
        return self.__pydantic_serializer__.to_json(self, exclude_unset=True, by_alias=True)


class PromptTokensDetails(ResponseModel):
    cached_tokens: int = Field(default=0, description="Prompt tokens that were found in the prefix cache.")


class CompletionTokensDetails(ResponseModel):
    reasoning_tokens: int = Field(default=0, description="Always 0: reasoning is not told apart.")
    accepted_prediction_tokens: int = Field(default=0, description="Drafted tokens that the model confirmed.")
    rejected_prediction_tokens: int = Field(default=0, description="Drafted tokens that the model did not confirm.")


class Usage(ResponseModel):
    """Token counts of a whole request, over all its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def total(cls, *usages: EngineUsage) -> Usage:
        """The counts of one prompt's answers. The prompt counts once, however many answers share it."""
        prompt = max((usage.prompt_tokens for usage in usages), default=0)
        completion = sum(usage.completion_tokens for usage in usages)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(
                # The answers after the first find the whole prompt cached; the first says what it cost.
                cached_tokens=min((usage.cached_tokens for usage in usages), default=0)
            ),
            completion_tokens_details=CompletionTokensDetails(
                accepted_prediction_tokens=sum(usage.accepted_draft_tokens for usage in usages),
                rejected_prediction_tokens=sum(usage.rejected_draft_tokens for usage in usages),
            ),
        )

    def __add__(self, other: Usage) -> Usage:
        """The counts of two prompts of one request."""
        ours, theirs = self.completion_tokens_details, other.completion_tokens_details
        cached = self.prompt_tokens_details.cached_tokens + other.prompt_tokens_details.cached_tokens
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            total_tokens=self.total_tokens + other.total_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens_details=CompletionTokensDetails(
                accepted_prediction_tokens=ours.accepted_prediction_tokens + theirs.accepted_prediction_tokens,
                rejected_prediction_tokens=ours.rejected_prediction_tokens + theirs.rejected_prediction_tokens,
            ),
        )


class TopLogprob(ResponseModel):
    """One token and its log-probability (natural log), before temperature and penalties."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(
        default=None, description="The token's UTF-8 bytes; a token may be part of a character."
    )

    null_sent = frozenset({"bytes"})


class TokenLogprob(TopLogprob):
    """A drawn token with the most likely tokens at its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(ResponseModel):
    """Log-probabilities of an answer's tokens, or of a chunk's."""

    content: list[TokenLogprob] | None = None
    refusal: list[TokenLogprob] | None = None

    null_sent = frozenset({"content", "refusal"})
