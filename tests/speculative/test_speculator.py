"""The speculator: whom it asks, what it verifies, what it counts. Proposers are told what to say; costs are fixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgellm.errors import BackendError
from edgellm.speculative.acceptance import Acceptance
from edgellm.speculative.costs import WIDTHS, StepCosts
from edgellm.speculative.proposer import Guess, Outlook, Prompt, Want
from edgellm.speculative.speculator import DRAFT_TOKENS, END, Draftable, Line, Speculator


class _Fixed(StepCosts):
    """Step times that stay as they are: a further row takes `slope` of the first."""

    def __init__(self, slope: float, first_s: float = 0.020) -> None:
        super().__init__({width: first_s * (1 + slope * (width - 1)) for width in WIDTHS})

    def observe(self, _rows: int, _seconds: float) -> None:
        pass


class _Says:
    """Says the same tokens each time, with a chance of its own for each of them."""

    most = 4

    def __init__(self, name: str, tokens: Sequence[int], chance: float, *, slope: float = 0.1) -> None:
        self.name = name
        self.acceptance = Acceptance((0.0, 1.0))
        self.costs = _Fixed(slope, 0.002)
        self.tokens, self.odds, self.chance = tuple(tokens), _odds(chance), chance
        self.pending, self.first, self.computing_s = 1, False, 0.0
        self.asked: list[Want] = []
        self.judged: list[list[bool]] = []
        self.told: list[int] = []
        self.ended: list[list[int]] = []

    def begin(self, _prompt: Prompt) -> str:
        return self.name

    def extend(self, state: str, tokens: Sequence[int]) -> None:
        assert state == self.name
        self.told += tokens

    def outlook(self, _state: str, _context: Sequence[int]) -> Outlook:
        return Outlook(self.pending, self.chance, self.first)

    def propose(self, wants: Sequence[Want]) -> list[Guess | None]:
        self.asked += wants
        tokens = [self.tokens[: want.limit] for want in wants]
        return [Guess(t, ((self.odds,),) * len(t), (self.chance,) * len(t)) if t else None for t in tokens]

    def judge(self, _state: str, _guess: Guess, fits: Sequence[bool]) -> None:
        self.judged.append(list(fits))

    def end(self, _state: str, answer: Sequence[int]) -> None:
        self.ended.append(list(answer))

    def forget(self) -> None:
        self.told.clear()

    def close(self) -> None:
        self.closed = True


def _odds(chance: float) -> float:
    return math.log(chance / (1 - chance))


def _line(speculator: Speculator, context: Sequence[int]) -> tuple[Line, Draftable]:
    line = speculator.begin(Prompt(context[:1], 0.0))
    return line, Draftable(line, context, DRAFT_TOKENS, 100)


def test_a_sure_guess_is_verified_and_counted() -> None:
    speculator = Speculator([_Says("free", [7, 8, 9], 0.9)], _Fixed(0.2))
    line, want = _line(speculator, [1, 2])
    assert speculator.draft([want], rows=1, room=8) == [(7, 8, 9)]
    speculator.judge(line, [7, 8, 5])
    stats = speculator.snapshot().proposers["free"]
    assert (stats.guesses, stats.accepted, stats.rejected) == (1, 2, 1)
    assert stats.saved_s == pytest.approx(2 * 0.020 - 3 * 0.2 * 0.020)
    assert (speculator.snapshot().target_calls, speculator.snapshot().tokens) == (1, 3)


def test_a_guess_that_does_not_pay_is_judged_all_the_same() -> None:
    proposer = _Says("free", [7, 8, 9], 0.1)
    speculator = Speculator([proposer], _Fixed(0.3))
    line, want = _line(speculator, [1, 2])
    assert speculator.draft([want], rows=1, room=8) == [()]
    speculator.judge(line, [7])
    assert proposer.judged == [[True]]
    assert speculator.snapshot().proposers["free"].guesses == 0


def test_what_was_guessed_for_the_end_is_wrong() -> None:
    proposer = _Says("free", [7, 8], 0.9)
    speculator = Speculator([proposer], _Fixed(0.1))
    line, want = _line(speculator, [1, 2])
    speculator.draft([want], rows=1, room=8)
    speculator.judge(line, [7, END])
    assert proposer.judged == [[True, False]]


def test_nothing_is_judged_twice() -> None:
    proposer = _Says("free", [7], 0.9)
    speculator = Speculator([proposer], _Fixed(0.1))
    line, want = _line(speculator, [1, 2])
    speculator.draft([want], rows=1, room=8)
    speculator.judge(line, [7, 3])
    speculator.judge(line, [7])  # a step for which nothing was asked: after a preemption
    assert proposer.judged == [[True]]


def test_the_better_of_two_guesses_is_taken() -> None:
    low, high = _Says("low", [1, 1, 1], 0.6), _Says("high", [2, 2, 2], 0.9)
    for proposers in ([low, high], [high, low]):
        speculator = Speculator(proposers, _Fixed(0.1))
        _, want = _line(speculator, [1, 2])
        assert speculator.draft([want], rows=1, room=8) == [(2, 2, 2)]


def test_until_a_step_was_timed_nothing_is_drafted() -> None:
    speculator = Speculator([_Says("free", [7], 0.99)], StepCosts())
    _, want = _line(speculator, [1, 2])
    assert speculator.draft([want], rows=1, room=8) == [()]
    speculator.observe(1, 0.02)
    assert speculator.draft([want], rows=1, room=8) == [(7,)]


def test_where_wider_steps_were_never_timed_likely_guesses_try_them() -> None:
    costs = StepCosts()
    costs.observe(1, 0.1)
    speculator = Speculator([_Says("free", [7] * 8, 0.8)], costs)
    _, want = _line(speculator, [1, 2])
    widths = []
    for _ in range(12):
        (draft,) = speculator.draft([want], rows=1, room=8)
        widths.append(1 + len(draft))
        speculator.observe(1 + len(draft), 0.1 * (1 + len(draft)))  # each row costs a step of its own
    assert widths.count(4) == 4
    assert widths[-1] == 1  # then it is known that this does not pay
    cautious = Speculator([_Says("free", [7] * 8, 0.4)], StepCosts())
    cautious.observe(1, 0.1)
    assert cautious.draft([want], rows=1, room=8) == [()]


def test_proposers_hear_what_was_written_and_the_whole_answer_in_the_end() -> None:
    proposer = _Says("free", [7], 0.9)
    speculator = Speculator([proposer], _Fixed(0.1))
    line, _ = _line(speculator, [1, 2, 3])
    speculator.draft([Draftable(line, [1, 2, 3], 4, 9)], rows=1, room=4)
    speculator.draft([Draftable(line, [1, 2, 3, 4, 5], 4, 9)], rows=1, room=4)
    assert proposer.told == [2, 3, 4, 5]
    speculator.end(line, [1, 2, 3, 4, 5, 6])
    assert proposer.ended == [[2, 3, 4, 5, 6]]


@pytest.mark.parametrize(
    ("chance", "first_s", "asked"),
    [
        (0.9, 0.002, True),  # good, and a tenth of the target's cost
        (0.9, 0.019, False),  # good, and as dear as the target
        (0.1, 0.002, False),  # cheap, and bad
    ],
)
def test_the_drafter_is_asked_where_it_pays(chance: float, first_s: float, asked: bool) -> None:
    drafter = _Says("model", [5, 5, 5, 5], chance)
    drafter.costs = _Fixed(0.1, first_s)
    speculator = Speculator([], _Fixed(0.2), drafter)  # type: ignore[arg-type]
    _, want = _line(speculator, [1, 2])
    (draft,) = speculator.draft([want], rows=1, room=8)
    assert bool(drafter.asked) == bool(draft) == asked
    if asked:
        assert 0.0 < drafter.asked[0].least < 1.0
        assert speculator.snapshot().proposers["model"].saved_s < 0  # the time it took


def _reading_drafter(pending: int, *, first: bool) -> tuple[_Says, Speculator]:
    drafter = _Says("model", [5, 5, 5, 5], 0.8)
    drafter.pending, drafter.first = pending, first
    return drafter, Speculator([], _Fixed(0.2), drafter)  # type: ignore[arg-type]


def _asked(speculator: Speculator, left: int) -> bool:
    line, _ = _line(speculator, [1, 2])
    return speculator.draft([Draftable(line, [1, 2], 8, left)], rows=1, room=8) != [()]


def test_a_drafter_that_has_a_long_prompt_to_read_for_a_short_answer_is_not_asked() -> None:
    _, speculator = _reading_drafter(1000, first=True)
    assert _asked(speculator, left=100)
    assert not _asked(speculator, left=10)
    line, _ = _line(speculator, [1, 2])
    for _ in range(60):
        speculator.end(line, range(8))  # answers are short
    assert not _asked(speculator, left=100)


def test_a_prompt_is_not_read_for_answers_that_the_drafter_is_hardly_asked_about() -> None:
    _, speculator = _reading_drafter(1000, first=True)
    for _ in range(40):
        line, _ = _line(speculator, [1, 2])
        line.asks = 1
        speculator.end(line, range(128))
    assert not _asked(speculator, left=100)
    for _ in range(40):
        line, _ = _line(speculator, [1, 2])
        line.asks = 30
        speculator.end(line, range(128))
    assert _asked(speculator, left=100)


def test_what_others_drafted_must_be_read_each_time() -> None:
    _, speculator = _reading_drafter(1000, first=False)
    assert not _asked(speculator, left=100)


def test_what_asking_takes_beside_the_steps_counts() -> None:
    _, speculator = _reading_drafter(1, first=False)
    assert _asked(speculator, left=100)
    speculator._beside_s = 0.05
    assert not _asked(speculator, left=100)


def test_a_drafter_is_not_asked_where_a_free_guess_is_better() -> None:
    drafter = _Says("model", [5, 5, 5, 5], 0.8)
    speculator = Speculator([_Says("free", [7] * 12, 0.97)], _Fixed(0.2), drafter)  # type: ignore[arg-type]
    _, want = _line(speculator, [1, 2])
    assert set(speculator.draft([want], rows=1, room=8)[0]) == {7}
    assert not drafter.asked


def test_a_hundredth_of_the_time_goes_into_finding_out() -> None:
    drafter = _Says("model", [5, 5], 0.1)
    drafter.costs = _Fixed(0.1, 0.001)
    speculator = Speculator([], _Fixed(0.2), drafter)  # type: ignore[arg-type]
    _, want = _line(speculator, [1, 2])
    speculator.draft([want], rows=1, room=8)
    assert not drafter.asked
    speculator.observe(1, 10.0)
    speculator.draft([want], rows=1, room=8)
    assert len(drafter.asked) == 1
    speculator._explored_s = 0.2  # more than that hundredth
    speculator.draft([want], rows=1, room=8)
    assert len(drafter.asked) == 1


def test_who_listens_hears_prompt_and_answer() -> None:
    speculator, heard = Speculator([_Says("a", [], 0.5)], _Fixed(0.1)), []
    line, _ = _line(speculator, [1, 2])
    speculator.heard = lambda prompt, answer: heard.append((list(prompt), list(answer)))
    speculator.end(line, [1, 2, 3, 4])
    assert heard == [([1], [2, 3, 4])]  # the prompt of `_line` is one token


def test_answers_of_before_are_remembered_by_those_that_cost_nothing() -> None:
    free, model = _Says("free", [], 0.5), _Says("model", [], 0.5)
    Speculator([free], _Fixed(0.1), model).remember([[1, 2], [3]])  # type: ignore[arg-type]
    assert (free.ended, model.ended) == ([[1, 2], [3]], [])


def test_forgetting_reaches_every_proposer() -> None:
    free, drafter = _Says("free", [7], 0.9), _Says("model", [5], 0.9)
    speculator = Speculator([free], _Fixed(0.2), drafter)  # type: ignore[arg-type]
    line, _ = _line(speculator, [1, 2])
    speculator.draft([Draftable(line, [1, 2], 4, 9)], rows=1, room=4)
    speculator.forget()
    assert free.told == drafter.told == []


def test_answers_go_on_without_a_drafter_that_fails() -> None:
    class _Fails(_Says):
        model = SimpleNamespace(path=Path("small.gguf"))

        def propose(self, wants: Sequence[Want]) -> list[Guess | None]:
            raise BackendError("no free KV cells")

    drafter = _Fails("model", [5] * 4, 0.9)
    speculator = Speculator([], _Fixed(0.2), drafter)  # type: ignore[arg-type]
    line, want = _line(speculator, [1, 2])
    assert speculator.draft([want], rows=1, room=8) == [()]
    speculator.judge(line, [7])
    assert speculator.drafter is None
    speculator.end(line, [1, 2, 7])
    speculator.close()
    assert drafter.closed
