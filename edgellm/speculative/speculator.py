"""Drafting for one target model: asks the proposers, decides what is verified, learns from what became of it.

Knows token ids and seconds; the engine verifies, by drawing each token as if there were no drafts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgellm.errors import BackendError
from edgellm.speculative.costs import StepCosts
from edgellm.speculative.drafter import Drafter
from edgellm.speculative.proposer import Guess, Prompt, Proposer, Want
from edgellm.speculative.share_out import Plan, share_out

DRAFT_TOKENS = 15
"""Most drafted tokens of an answer in a step."""

_LENGTHS = (2, 3, 4, 6, 8)  # drafts by the drafter that are weighed against each other
_DRAFTER_GAIN = 1.06
"""What asking the drafter promises must beat doing without by as much: more is estimated than for guesses at hand."""
_USUAL_ASKS = 24.0  # how often the drafter is asked about an answer that it is asked about, until some have been seen
_USUAL_TOKENS = 128.0  # of an answer, until some have been seen
_LEAST_LEFT = 16.0  # that an answer longer than usual will still have
_FORGETTING = 0.1
_SURELY = 0.5  # a token with this part of the probability that would pay for its row is surely not worth looking up
_EXPLORING = 0.01  # of all time may go into drafts that are not expected to pay: the expectation may be wrong

_TRIED = (3, 7, 1)  # drafted tokens, for steps of widths that have not been seen
_LIKELY = 0.5

_log = logging.getLogger(__name__)

END = -1
"""Drawn where an answer ends: whatever was guessed for that place is wrong."""


@dataclass(slots=True)
class ProposerStats:
    """Counts since the model was loaded."""

    guesses: int = 0  # that were verified, in whole or in part
    accepted: int = 0  # tokens
    rejected: int = 0
    saved_s: float = 0.0  # estimated: the steps that accepted tokens made needless, less what drafts added to others


@dataclass(frozen=True, slots=True)
class SpeculatorSnapshot:
    """The figures at one moment."""

    target_calls: int  # rows with which answers went on: one for each answer in each step
    tokens: int  # that they brought
    proposers: dict[str, ProposerStats]


@dataclass(slots=True, eq=False)
class Line:
    """One answer, as far as drafting goes."""

    prompt: Prompt
    states: dict[str, Any]  # of each proposer
    known: int  # tokens of the context that the proposers have been told
    proposer: Proposer | None = None  # that made the guess of this step
    guess: Guess | None = None
    chances: Sequence[float] = ()  # of its tokens
    drafted: int = 0  # tokens of the guess that are verified
    asks: int = 0  # how often the drafter was asked


@dataclass(frozen=True, slots=True)
class Draftable:
    """An answer that goes on in a step."""

    line: Line
    context: Sequence[int]  # prompt and answer so far
    limit: int  # most tokens that may be drafted
    limit_left: int  # most tokens that the answer may still have


@dataclass(frozen=True, slots=True)
class _Step:
    """What the step at hand consists of."""

    answers: int
    rows: int  # without drafts
    drafted: int


class Speculator:
    """One for each loaded model; lives on the engine thread."""

    def __init__(self, proposers: Sequence[Proposer], costs: StepCosts, drafter: Drafter | None = None) -> None:
        """`proposers` cost next to nothing and are asked in every step, `drafter` where it pays."""
        self.proposers = tuple(proposers)
        self.drafter = drafter
        self.all: tuple[Proposer, ...] = (*proposers, *([drafter] if drafter is not None else ()))
        self.costs = costs
        self.stats = {proposer.name: ProposerStats() for proposer in self.all}
        self._steps_s = 0.0
        self._explored_s = 0.0
        self._exploring = False  # the drafter is asked though it is not expected to pay
        self._usual_tokens = _USUAL_TOKENS
        self._usual_asks = _USUAL_ASKS
        self._beside_s = 0.0  # what asking the drafter takes beside its steps
        self._target_calls = 0
        self._tokens = 0
        self.prepare: Callable[[], None] = lambda: None
        """On the engine thread, before the first answer: measures step times not known yet. Raises BackendError."""
        self.save: Callable[[], None] = lambda: None
        """Keeps on disk what was learned."""
        self.heard: Callable[[Sequence[int], Sequence[int]], None] = lambda _prompt, _answer: None
        """Told the prompt and the answer, at each answer's end. Quick, and raises nothing."""
        self._step = _Step(1, 1, 0)

    # --- one answer -----------------------------------------------------------------------------------------------

    def begin(self, prompt: Prompt) -> Line:
        """Follows an answer from its first token on."""
        states = {proposer.name: proposer.begin(prompt) for proposer in self.all}
        return Line(prompt, states, len(prompt.tokens))

    def end(self, line: Line, context: Sequence[int]) -> None:
        """The answer is over. `context`: prompt and answer."""
        answer = context[len(line.prompt.tokens) :]
        self._usual_tokens += _FORGETTING * (len(answer) - self._usual_tokens)
        if line.asks:
            self._usual_asks += _FORGETTING * (line.asks - self._usual_asks)
        for proposer in self.all:
            proposer.end(line.states[proposer.name], answer)
        self.heard(line.prompt.tokens, answer)

    # --- one step -------------------------------------------------------------------------------------------------

    def draft(self, wanted: Sequence[Draftable], *, rows: int, room: int) -> list[tuple[int, ...]]:
        """What to verify for each answer in a step of `rows` rows, to which at most `room` may be added.

        Each of `wanted` has a row among these, for its next token.
        """
        for want in wanted:
            self._tell(want)
        self._step = _Step(len(wanted), rows, 0)
        open_wants = [want for want in wanted if want.limit > 0]
        least = _SURELY * self._row_s() * len(wanted) / self.costs.seconds(len(wanted))
        for proposer in self.proposers:
            self._ask(proposer, open_wants, least)
        room = room if self.costs.known else 0
        plan = self._share_out(wanted, room)
        if self.drafter is not None and room and open_wants:
            asked, least = self._worth_drafting(self.drafter, wanted, room, plan.rate)
            if asked:
                self._ask_drafter(self.drafter, asked, least)
                plan = self._share_out(wanted, room)
        if room and not any(plan.counts):
            self._try_a_width(wanted, plan, room)
        drafts: list[tuple[int, ...]] = []
        for want, count in zip(wanted, plan.counts, strict=True):
            guess = want.line.guess
            want.line.drafted = count
            drafts.append(guess.tokens[:count] if guess is not None else ())
        self._step = _Step(len(wanted), rows, sum(plan.counts))
        return drafts

    def _share_out(self, wanted: Sequence[Draftable], room: int) -> Plan:
        chances = [want.line.chances for want in wanted]
        return share_out(chances, answers=len(wanted), rows=self._step.rows, room=room, seconds=self.costs.seconds)

    def _try_a_width(self, wanted: Sequence[Draftable], plan: Plan, room: int) -> None:
        """Where the time of wider steps is a mere assumption, some that are likely to bring something are tried."""
        rows = self._step.rows
        for count in _TRIED:
            if count > room or not self.costs.uncertain(rows + count):
                continue
            for index, want in enumerate(wanted):
                chances = want.line.chances[:count]
                if len(chances) == count and expected_tokens(chances) > _LIKELY * count:
                    plan.counts[index] = count
                    return

    def _worth_drafting(
        self, drafter: Drafter, wanted: Sequence[Draftable], room: int, rate: float
    ) -> tuple[list[Draftable], float]:
        """The answers that the drafter should be asked about, if that promises more than `rate` tokens a second, and
        the least probability with which a further token is worth drafting."""
        outlooks = {
            index: drafter.outlook(want.line.states[drafter.name], want.context)
            for index, want in enumerate(wanted)
            if want.limit > 0
        }
        better = [
            index
            for index, outlook in outlooks.items()
            if expected_tokens([outlook.chance] * _LENGTHS[-1]) > expected_tokens(wanted[index].line.chances)
        ][: drafter.most]
        if not better:
            return [], 0.0
        pending = sum(outlooks[index].pending for index in better)
        reading_s = drafter.costs.seconds(pending)
        if any(outlooks[index].first for index in better):  # prompts are read once for all asks that follow
            left = min(self._left(wanted[index]) for index in better)
            reading_s /= max(1.0, min(self._usual_asks, left / _LENGTHS[0]))
        best_rate = rate
        for length in _LENGTHS:
            chances = [want.line.chances for want in wanted]
            for index in better:
                chances[index] = [outlooks[index].chance] * min(length, wanted[index].limit)
            plan = share_out(
                chances,
                answers=len(wanted),
                rows=self._step.rows,
                room=room,
                seconds=self.costs.seconds,
                offset_s=reading_s + (length - 1) * drafter.costs.seconds(len(better)) + self._beside_s,
            )
            best_rate = max(best_rate, plan.rate)
        self._exploring = best_rate <= _DRAFTER_GAIN * rate
        if self._exploring and not self._may_explore(reading_s):
            return [], 0.0
        least = rate * (drafter.costs.seconds(len(better)) / len(better) + self._row_s())
        return [wanted[index] for index in better], least

    def _left(self, want: Draftable) -> float:
        """Tokens that the answer will probably still have: as many as answers have had lately."""
        so_far = len(want.context) - len(want.line.prompt.tokens)
        return min(want.limit_left, max(_LEAST_LEFT, self._usual_tokens - so_far))

    def _row_s(self) -> float:
        """What a drafted token adds to the time of the step."""
        rows, seconds = self._step.rows, self.costs.seconds
        return (seconds(rows + _LENGTHS[-1]) - seconds(rows)) / _LENGTHS[-1]

    def _may_explore(self, reading_s: float) -> bool:
        """Whether asking costs so little, of all time so far, that it may be done to learn how good the drafter is."""
        return self._explored_s + reading_s < _EXPLORING * self._steps_s

    def _ask_drafter(self, drafter: Drafter, wanted: Sequence[Draftable], least: float) -> None:
        """Answers go on without a drafter that fails."""
        started, computing_s = time.perf_counter(), drafter.computing_s
        for want in wanted:
            want.line.asks += 1
        try:
            self._ask(drafter, wanted, least)
        except BackendError as error:
            _log.error("the drafter %s is not asked any more: %s", drafter.model.path.name, error)
            self.drafter = None
        seconds = time.perf_counter() - started
        self._beside_s += _FORGETTING * (seconds - (drafter.computing_s - computing_s) - self._beside_s)
        self._explored_s += seconds if self._exploring else 0.0
        self.stats[drafter.name].saved_s -= seconds

    def _tell(self, want: Draftable) -> None:
        line = want.line
        line.proposer, line.guess, line.chances = None, None, ()
        if line.known < len(want.context):
            new = want.context[line.known :]
            for proposer in self.all:
                proposer.extend(line.states[proposer.name], new)
            line.known = len(want.context)

    def _ask(self, proposer: Proposer, wanted: Sequence[Draftable], least: float) -> None:
        """The guess from which the most is to be expected is the one that is kept."""
        wants = [Want(want.line.states[proposer.name], want.context, want.limit, least) for want in wanted]
        for want, guess in zip(wanted, proposer.propose(wants), strict=True):
            if guess is None:
                continue
            line = want.line
            if expected_tokens(guess.chances) > expected_tokens(line.chances):
                line.proposer, line.guess, line.chances = proposer, guess, guess.chances

    def judge(self, line: Line, drawn: Sequence[int]) -> None:
        """What the target drew in the step: one token or more, the last one END if it ends the answer. What was guessed
        and not verified is judged, too."""
        self._target_calls += 1
        self._tokens += len(drawn)
        guess, proposer = line.guess, line.proposer
        line.guess = None
        if guess is None or proposer is None or not drawn:
            return
        fits: list[bool] = []
        for token, guessed in zip(drawn, guess.tokens, strict=False):
            fits.append(token == guessed)
            if token != guessed:
                break
        proposer.judge(line.states[proposer.name], guess, fits)
        if line.drafted:
            self._count(proposer, line.drafted, min(sum(fits), line.drafted))

    def _count(self, proposer: Proposer, drafted: int, accepted: int) -> None:
        stats, step, seconds = self.stats[proposer.name], self._step, self.costs.seconds
        stats.guesses += 1
        stats.accepted += accepted
        stats.rejected += drafted - accepted
        added_s = seconds(step.rows + step.drafted) - seconds(step.rows)
        stats.saved_s += accepted * seconds(step.answers) / step.answers - added_s * drafted / step.drafted

    def remember(self, answers: Sequence[Sequence[int]]) -> None:
        """Answers given before this start, the oldest first: they may come again. Takes half a second for a million
        tokens."""
        for proposer in self.proposers:
            for answer in answers:
                proposer.end(proposer.begin(Prompt((), 0.0)), answer)

    def forget(self) -> None:
        """Whatever was learned from texts. Figures and step times stay."""
        for proposer in self.all:
            proposer.forget()

    def close(self) -> None:
        """Keeps what was learned, and frees the drafter."""
        self.save()
        for proposer in self.all:
            proposer.close()

    def snapshot(self) -> SpeculatorSnapshot:
        """The figures now. Any thread may ask."""
        proposers = {name: replace(stats) for name, stats in self.stats.items()}
        return SpeculatorSnapshot(self._target_calls, self._tokens, proposers)

    def observe(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        self.costs.observe(rows, seconds)
        self._steps_s += seconds


def expected_tokens(chances: Sequence[float]) -> float:
    """How many of a guess's tokens will be accepted."""
    total, together = 0.0, 1.0
    for chance in chances:
        together *= chance
        total += together
    return total
