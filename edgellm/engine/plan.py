"""What goes into the next step: plain arithmetic over the answers that are running, testable without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.engine.cache import AdapterSet
from edgellm.engine.sequence import Answer


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """How much a runner does at once."""

    parallel: int  # answers running at the same time
    batch_tokens: int  # rows of a step
    prompt_chunk_tokens: int  # prompt rows of a step while a stream is running
    draft_rows: int = 0  # drafted rows of a step


@dataclass(frozen=True, slots=True)
class Share:
    """An answer's part of a step: `count` of its pending tokens, then `draft`."""

    answer: Answer
    count: int
    completes: bool  # the last pending token is among them, so logits are wanted
    draft: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the batch, which is also KV cells."""
        return self.count + len(self.draft)


def choose_adapters(running: Sequence[Answer], last: AdapterSet | None) -> AdapterSet:
    """The adapter set that the next step serves: the sets take turns, starting after `last`, in order of arrival."""
    sets = list(dict.fromkeys(answer.job.request.adapters for answer in running))
    if last in sets:
        return sets[(sets.index(last) + 1) % len(sets)]
    return sets[0]


def plan_step(
    running: Sequence[Answer],
    adapters: AdapterSet,
    *,
    batch_tokens: int,
    prompt_chunk_tokens: int,
) -> list[Share]:
    """Shares of the next step for the answers that use `adapters`.

    Every decoding answer comes first, so that its stream moves. Prompts follow in order of arrival; while any stream is
    running, in whatever adapter set, they get at most `prompt_chunk_tokens` together.
    """
    members = [answer for answer in running if answer.job.request.adapters == adapters]
    shares = [Share(answer, 1, True) for answer in members if answer.pending == 1]
    room = batch_tokens - len(shares)
    streaming = any(answer.pending == 1 for answer in running)
    budget = min(room, prompt_chunk_tokens) if streaming else room
    for answer in members:
        if answer.pending > 1 and budget > 0:
            count = min(answer.pending, budget)
            shares.append(Share(answer, count, count == answer.pending))
            budget -= count
    return shares
