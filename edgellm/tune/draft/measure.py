"""How good a drafter is for a target: along known answers, through the drafter that serves, on llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import load_packed
from edgellm.backend.vocab import Vocab
from edgellm.speculative.buffer import Record
from edgellm.speculative.calibration import measure_steps
from edgellm.speculative.costs import StepCosts
from edgellm.speculative.drafter import load_drafter
from edgellm.speculative.replay import Replay, replay
from edgellm.tune.draft.samples import Row

DRAFTED = 4
"""Target tokens drafted for a call, in measuring."""

_ANSWER_TOKENS = 128  # of each answer


@dataclass(frozen=True, slots=True)
class Quality:
    """A drafter along greedy answers; a call is one step of the target."""

    acceptance: float  # share of drafted tokens that the target wrote
    tokens_a_call: float  # the target's own included
    draft_s: float  # for a call
    token_s: float  # for one token of the drafter


@dataclass(frozen=True, slots=True)
class TargetCosts:
    """Seconds of a target's steps."""

    one_s: float
    verify_s: float  # with DRAFTED drafted tokens

    def break_even(self, quality: Quality) -> float:
        """Tokens that a call must give for drafting to be no loss."""
        return (self.verify_s + quality.draft_s) / self.one_s

    def speed_up(self, quality: Quality) -> float:
        """Of the target by this drafter, if it always drafts."""
        return quality.tokens_a_call / self.break_even(quality)


def measure_target(path: Path, *, threads: int) -> TargetCosts:
    """Raises ModelLoadError, BackendError."""
    model = load_packed(path)
    try:
        params = ContextParams(context_tokens=256, sequences=1, batch_tokens=16, outputs=16, threads=threads)
        context = Context(model, params)
        try:
            costs = StepCosts(measure_steps(context, most_s=10.0))
        finally:
            context.close()
    finally:
        model.close()
    return TargetCosts(costs.seconds(1), costs.seconds(1 + DRAFTED))


def measure_drafter(path: Path, target: Vocab, rows: Sequence[Row], *, threads: int) -> Quality:
    """Drafts DRAFTED tokens at each call along `rows`' answers. Raises ModelLoadError, BackendError."""
    drafter = load_drafter(path, target, threads=threads)
    records = [Record(tuple(row.prompt), tuple(row.answer[:_ANSWER_TOKENS])) for row in rows]
    try:
        steps = measure_steps(drafter.context)
        found = sum(replay(drafter, records, most=DRAFTED, together=1), Replay())
    finally:
        drafter.close()
    return Quality(found.acceptance, found.tokens_per_call, found.seconds / max(1, found.calls), steps[1])
