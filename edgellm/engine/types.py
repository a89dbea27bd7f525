"""What goes into the engine and what comes out of it: token ids, never text."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from edgellm.backend.sampler import Grammar, SamplingParams
from edgellm.errors import EdgeLLMError

__all__ = [
    "AdapterUse",
    "ErrorEvent",
    "Event",
    "EventSink",
    "FinishEvent",
    "FinishReason",
    "GenerateRequest",
    "Grammar",
    "SamplingParams",
    "TokenEvent",
    "TokenLogprob",
    "Usage",
]


class FinishReason(enum.StrEnum):
    """Why a sequence ended. The names are OpenAI's, but for CANCELLED, which never reaches a client."""

    STOP = "stop"  # an end-of-generation token, or one of the request's stop tokens
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """A loaded LoRA adapter at a scale. A request's adapter set is an ordered tuple of these."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt, `n` answers."""

    prompt: tuple[int, ...]  # (tokens,), at least one
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    stop_tokens: frozenset[int] = frozenset()  # in addition to the model's end-of-generation tokens
    ignore_eos: bool = False
    top_logprobs: int | None = None  # None: no logprobs; 0: the drawn token's only
    adapters: tuple[AdapterUse, ...] = ()
    prediction: tuple[int, ...] = ()  # what the answer is expected to be; it is drafted from, and changes nothing

    @property
    def penalised_tokens(self) -> tuple[int, ...]:
        """The end of the prompt, as far as a repetition penalty looks back."""
        if self.sampling.repetition_penalty == 1.0:
            return ()
        return self.prompt[-self.sampling.repetition_window :]

    def sampling_with(self, end_tokens: Iterable[int]) -> SamplingParams:
        """How tokens are drawn, `end_tokens` being the model's: never, if the request ignores them."""
        if not self.ignore_eos:
            return self.sampling
        ends = ((token, -math.inf) for token in end_tokens)
        return replace(self.sampling, logit_bias=(*self.sampling.logit_bias, *ends))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities (natural log) under the model's own distribution, before temperature and penalties."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most probable first


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of answer `index`. An end-of-generation token is not reported; FinishEvent follows instead."""

    index: int
    token: int
    logprob: TokenLogprob | None = None
    cached_tokens: int = 0  # of the prompt
    accepted_drafts: int = 0  # of the answer up to here, as in Usage
    rejected_drafts: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer. `cached_tokens` of the prompt were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    accepted_draft_tokens: int = 0
    rejected_draft_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """Answer `index` is complete. Exactly one FinishEvent or ErrorEvent ends every answer."""

    index: int
    reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The whole request failed; nothing follows."""

    error: EdgeLLMError


Event = TokenEvent | FinishEvent | ErrorEvent
EventSink = Callable[[list[Event]], None]
"""Called on the engine thread, once a step, with this request's events in order. Must not block."""
