"""One answer in the making."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from edgellm.backend.context import Context
from edgellm.engine.cache import Entry
from edgellm.engine.types import Event, EventSink, FinishReason, GenerateRequest, Usage
from edgellm.speculative.proposer import Prompt
from edgellm.speculative.speculator import Line


class TokenSampler(Protocol):
    """Draws a token from a row of logits; `None` means that a grammar leaves nothing to draw."""

    def sample(self, context: Context, row: int) -> int | None: ...

    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Job:
    """A request and its answers."""

    request: GenerateRequest
    sink: EventSink
    number: int  # order of arrival
    answers: list[Answer] = field(default_factory=list)
    cancelled: bool = False
    events: list[Event] = field(default_factory=list)  # of the current step, not yet delivered
    draft_prompt: Prompt | None = None  # what drafting makes of the prompt, for all answers

    @property
    def unfinished(self) -> int:
        """Answers still to be completed."""
        return sum(1 for answer in self.answers if not answer.finished)


@dataclass(slots=True, eq=False)
class Answer:
    """The state of one answer: what it consists of, and how much of that is in the KV cache."""

    job: Job
    index: int
    sampler: TokenSampler
    tokens: list[int]  # the prompt, then the answer
    entry: Entry | None = None  # None while waiting or preempted
    leader: Answer | None = None  # answer 0 of the same prompt, while it is still reading the prompt
    generated: int = 0
    cached_tokens: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0
    line: Line | None = None  # what drafting knows of it
    finished: bool = False
    reason: FinishReason | None = None  # of an answer that came to its end

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.job.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens not yet in the KV cache; 1 while decoding, more while the prompt is read or after a preemption."""
        return len(self.tokens) - (len(self.entry.tokens) if self.entry else 0)

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.generated,
            cached_tokens=self.cached_tokens,
            accepted_draft_tokens=self.accepted_drafts,
            rejected_draft_tokens=self.rejected_drafts,
        )
