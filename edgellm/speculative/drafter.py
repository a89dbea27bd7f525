"""Drafts by a small model of any vocabulary: it reads the answer in its own tokens and goes on greedily.

The likeliest token is the best draft at any temperature, for it is compared with a token that is drawn independently.
How far to draft is decided token by token: it ends as soon as the tokens so far are too unlikely to be accepted all.
OmniDraft (arXiv 2507.02659, section 3.3) decides likewise, by a head on the drafter's state and for equal vocabularies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams, Floats
from edgellm.backend.model import Model, load_packed
from edgellm.backend.vocab import Vocab
from edgellm.speculative.acceptance import Acceptance
from edgellm.speculative.bridge import EVERY_WAY, Bridge, Mapped, Way
from edgellm.speculative.costs import StepCosts
from edgellm.speculative.ngram_cache import NgramCache
from edgellm.speculative.proposer import Evidence, Guess, Outlook, Prompt, Want
from edgellm.speculative.transcript import Transcript

SEQUENCES = 4
"""Answers that a drafter follows at a time: with more of them running, drafting by a model does not pay."""

CELLS = 768
"""Tokens of an answer that a drafter has before it, at most."""

READ_TOKENS = 256
"""Of a prompt, from its end, in the target's tokens."""

BATCH_TOKENS = 512
"""Rows of a drafter's step."""

_FORGETTING = 0.1
_CHANCE = 0.6  # that a token is accepted, until it is known
_MOST_DRAFTED = 24  # drafter tokens: they may be shorter than the target's
# Constant, then as `_evidence` has them: what was learned from SmolLM2-135M drafting for Qwen2.5-Coder-0.5B.
_WEIGHTS = (0.7, 4.0, 0.5, -0.3, 0.5, 1.7, -0.5)


def drafter_context(model: Model, *, threads: int, flash_attention: Literal["auto", "on", "off"] = "auto") -> Context:
    """The context that a Drafter of `model` works in. Raises ModelLoadError."""
    return Context(
        model,
        ContextParams(
            context_tokens=SEQUENCES * CELLS,
            sequences=SEQUENCES,
            batch_tokens=BATCH_TOKENS,
            outputs=SEQUENCES,
            threads=threads,
            flash_attention=flash_attention,
        ),
    )


def load_drafter(
    path: Path, target: Vocab, *, threads: int, cache: NgramCache | None = None, ways: Way = EVERY_WAY
) -> Drafter:
    """The drafter in a file, whose step times are not known. Raises ModelLoadError."""
    model = load_packed(path)
    try:
        bridge = Bridge(model.vocab, target, NgramCache() if cache is None else cache, ways=ways)
        return Drafter(model, drafter_context(model, threads=threads), bridge, StepCosts())
    except BaseException:
        model.close()
        raise


@dataclass(slots=True, eq=False)
class _State:
    """What belongs to one answer."""

    temperature: float
    transcript: Transcript | None = None
    sequence: int = -1  # -1: none; nothing is cached then
    cached: int = 0  # drafter tokens in the cells that are still those of the answer
    drafted: list[int] = field(default_factory=list)  # in the cells behind them, as far as they were computed
    record: float = 0.0  # how much oftener than foreseen this answer's guesses have fitted lately, -1 to 1
    asked: int = 0  # when it was last asked about


@dataclass(slots=True, eq=False)
class _Run:
    """A draft in the making."""

    want: Want
    state: _State
    feed: list[int]  # drafter tokens to compute next
    position: int
    tokens: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    mapped: list[Mapped] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)


class Drafter:
    """The proposer. Owns its model and context; lives on the engine thread."""

    name = "model"
    most = SEQUENCES

    def __init__(self, model: Model, context: Context, bridge: Bridge, costs: StepCosts) -> None:
        """`context` is that of `drafter_context`. Both are closed with it."""
        self.model, self.context, self.bridge, self.costs = model, context, bridge, costs
        self.acceptance = Acceptance(_WEIGHTS)
        self.cache_path: Path | None = None  # where the bridge's n-grams are kept
        self.chance = _CHANCE  # that a token is accepted, lately
        self.computing_s = 0.0  # so far
        self._batch = Batch(BATCH_TOKENS)
        self._holders: list[_State | None] = [None] * SEQUENCES
        self._turn = 0

    # --- one answer -----------------------------------------------------------------------------------------------

    def begin(self, prompt: Prompt) -> _State:
        """The state of an answer that is about to begin. Nothing is read until it is asked about."""
        return _State(prompt.temperature)

    def extend(self, state: _State, tokens: Sequence[int]) -> None:
        """The answer went on with `tokens`."""
        if state.transcript is not None:
            same = state.transcript.extend(tokens, state.drafted)
            state.cached = min(same, state.cached + len(state.drafted))
            state.drafted = []

    def end(self, state: _State, answer: Sequence[int]) -> None:
        """The answer is over."""
        self._leave(state)
        self.bridge.learn(answer)

    def outlook(self, state: _State, context: Sequence[int]) -> Outlook:
        """What a guess would take and bring."""
        chance = min(0.95, max(0.05, self.chance + state.record))
        if state.transcript is None or state.sequence < 0:
            return Outlook(min(len(context), READ_TOKENS), chance, first=True)
        return Outlook(max(1, len(state.transcript.tokens) - state.cached), chance)

    def judge(self, state: _State, guess: Guess, fits: Sequence[bool]) -> None:
        """Learns how far such guesses can be trusted."""
        for evidence, fit in zip(guess.evidence, fits, strict=False):
            self.chance += 0.02 * (float(fit) - self.chance)
            state.record += _FORGETTING * (float(fit) - self.chance - state.record)
            self.acceptance.learn(evidence, fit)

    def forget(self) -> None:
        """What was learned from answers, but for the model itself."""
        self.acceptance, self.chance = Acceptance(_WEIGHTS), _CHANCE
        self.bridge.cache.clear()

    def swap(self, model: Model, context: Context, bridge: Bridge) -> None:
        """Drafts with another model from now on; `context` is that of `drafter_context`. They are the drafter's own
        then, and those before are closed. Answers under way are read anew."""
        for holder in self._holders:
            if holder is not None:
                self._leave(holder)
        before = self.context, self.model
        self.model, self.context, self.bridge = model, context, bridge
        self.chance = max(self.chance, _CHANCE)  # of a drafter that did badly, it is found out anew
        for one in before:
            one.close()

    # --- drafting -------------------------------------------------------------------------------------------------

    def propose(self, wants: Sequence[Want]) -> list[Guess | None]:
        """Drafts for all of `wants` together, as far as each is worth it. At most SEQUENCES of them."""
        self._turn += 1
        runs = [self._start(want) for want in wants[:SEQUENCES]]
        going = [run for run in runs if run.feed]  # there may be nothing yet that its vocabulary can spell
        while going:
            going = [run for run, logits in self._compute(going) if self._go_on(run, logits)]
        for run in runs:
            run.state.drafted = run.tokens[: run.position - len(run.state.transcript.tokens)]  # type: ignore[union-attr]
        guesses: list[Guess | None] = [
            Guess(tuple(mapped.token for mapped in run.mapped), tuple(run.evidence), tuple(run.chances))
            if run.mapped
            else None
            for run in runs
        ]
        return guesses + [None] * (len(wants) - len(guesses))

    def _start(self, want: Want) -> _Run:
        state: _State = want.state
        state.asked = self._turn
        if state.transcript is not None and len(state.transcript.tokens) + _MOST_DRAFTED > CELLS:
            self._leave(state)  # and reads the end of it anew
        if state.sequence < 0:
            self._enter(state)
            state.transcript = Transcript(self.bridge, want.context[-READ_TOKENS:])
            if len(state.transcript.tokens) + _MOST_DRAFTED > CELLS:
                state.transcript = Transcript(self.bridge, want.context[-READ_TOKENS // 8 :])
        tokens = state.transcript.tokens  # type: ignore[union-attr]
        start = max(0, min(state.cached, len(tokens) - 1))
        self.context.remove(state.sequence, start)
        state.cached = len(tokens)
        return _Run(want, state, list(tokens[start:]), start)

    def _compute(self, runs: Sequence[_Run]) -> list[tuple[_Run, Floats]]:
        self._read(runs)
        batch = self._batch
        batch.clear()
        rows = []
        for run in runs:
            batch.extend(run.feed, run.position, run.state.sequence, outputs=1)
            run.position += len(run.feed)
            rows.append(batch.n_tokens - 1)
        self._decode()
        return [(run, self.context.logits(row)) for run, row in zip(runs, rows, strict=True)]

    def _read(self, runs: Sequence[_Run]) -> None:
        """Computes so much of what the answers have to read that one step has room for the rest."""
        batch, most = self._batch, BATCH_TOKENS // len(runs)
        for run in runs:
            while (excess := min(len(run.feed) - most, BATCH_TOKENS)) > 0:
                batch.clear()
                batch.extend(run.feed[:excess], run.position, run.state.sequence, outputs=0)
                self._decode()
                run.position += excess
                run.feed = run.feed[excess:]

    def _decode(self) -> None:
        started = time.perf_counter()
        self.context.decode(self._batch)
        seconds = time.perf_counter() - started
        self.computing_s += seconds
        self.costs.observe(self._batch.n_tokens, seconds)

    def _go_on(self, run: _Run, logits: Floats) -> bool:
        """Takes the likeliest token; whether another is worth it."""
        token = int(logits.argmax())
        if self.model.vocab.is_end(token):
            return False
        top = float(logits[token])
        run.probabilities.append(1.0 / float(np.exp(logits - top).sum()))
        run.tokens.append(token)
        run.feed = [token]
        held = run.state.transcript.held  # type: ignore[union-attr]
        found = self.bridge.to_target(run.tokens, run.probabilities, final=False, held=held)
        run.mapped = found[: run.want.limit]  # what comes behind a token may turn it into another
        run.evidence = [_evidence(mapped, place, run.state) for place, mapped in enumerate(run.mapped)]
        run.chances = [self.acceptance.probability(evidence) for evidence in run.evidence]
        if len(run.tokens) >= _MOST_DRAFTED or len(run.mapped) >= run.want.limit:
            return False
        return math.prod(run.chances) * self.chance >= run.want.least

    # --- cells ----------------------------------------------------------------------------------------------------

    def _enter(self, state: _State) -> None:
        """Takes a sequence, if need be that of the answer that has not been asked about for longest."""
        sequence = min(range(SEQUENCES), key=lambda s: holder.asked if (holder := self._holders[s]) else -1)
        holder = self._holders[sequence]
        if holder is not None:
            self._leave(holder)
        self._holders[sequence] = state
        state.sequence, state.cached, state.drafted = sequence, 0, []

    def _leave(self, state: _State) -> None:
        if state.sequence >= 0:
            self.context.remove(state.sequence)
            self._holders[state.sequence] = None
        state.sequence, state.cached, state.drafted, state.transcript = -1, 0, [], None

    def close(self) -> None:
        """Frees context and model."""
        self.context.close()
        self.model.close()


def _evidence(mapped: Mapped, place: int, state: _State) -> Evidence:
    probability = min(0.999, max(0.001, mapped.probability))
    return (
        math.log(probability / (1 - probability)) / 7,
        float(mapped.way is Way.NGRAM),
        float(mapped.way is Way.TEXT),
        place / 8,
        state.record,
        state.temperature,
    )
