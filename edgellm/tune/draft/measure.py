"""How good a drafter is for a target: along known answers, through the drafter that serves, on llama.cpp."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.backend.packing import packing_kernels
from edgellm.backend.vocab import Vocab
from edgellm.speculative.bridge import Bridge
from edgellm.speculative.calibration import measure_steps
from edgellm.speculative.costs import StepCosts
from edgellm.speculative.drafter import BATCH_TOKENS, CELLS, SEQUENCES, Drafter
from edgellm.speculative.ngram_cache import NgramCache
from edgellm.speculative.proposer import Prompt, Want
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
    model = _load(path)
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
    model = _load(path)
    params = ContextParams(
        context_tokens=SEQUENCES * CELLS,
        sequences=SEQUENCES,
        batch_tokens=BATCH_TOKENS,
        outputs=SEQUENCES,
        threads=threads,
    )
    try:
        context = Context(model, params)
    except BaseException:
        model.close()
        raise
    steps = measure_steps(context)
    drafter = Drafter(model, context, Bridge(model.vocab, target, NgramCache()), StepCosts(steps))
    try:
        sums = _Sums()
        for row in rows:
            _follow(drafter, row, sums)
    finally:
        drafter.close()
    calls = max(1, sums.calls)
    return Quality(sums.accepted / max(1, sums.drafted), sums.tokens / calls, sums.seconds / calls, steps[1])


@dataclass(slots=True)
class _Sums:
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    calls: int = 0
    seconds: float = 0.0


def _follow(drafter: Drafter, row: Row, sums: _Sums) -> None:
    """One answer, with what its target would accept. The first draft, which reads the prompt, is not timed."""
    written, answer, at = list(row.prompt), row.answer[:_ANSWER_TOKENS], 0
    state = drafter.begin(Prompt(written, 0.0))
    while at < len(answer):
        started = time.perf_counter()
        (guess,) = drafter.propose([Want(state, written, DRAFTED)])
        if at:
            sums.seconds += time.perf_counter() - started
        count = 0
        if guess is not None:
            fits = [drafted == true for drafted, true in zip(guess.tokens, answer[at:], strict=False)]
            count = fits.index(False) if False in fits else len(fits)
            sums.drafted += len(fits)  # what goes beyond the answer is neither right nor wrong
            if fits:
                drafter.judge(state, guess, fits[: count + 1])
        drawn = answer[at : at + count + 1]
        written += drawn
        drafter.extend(state, drawn)
        at += len(drawn)
        sums.accepted, sums.tokens, sums.calls = sums.accepted + count, sums.tokens + len(drawn), sums.calls + 1
    drafter.end(state, answer)


def _load(path: Path) -> Model:
    packed = packing_kernels() is not None
    return Model(path, mapped=not packed, packed=packed)
