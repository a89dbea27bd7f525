"""Drafts without a model: where they come from, and what is known about them."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from edgellm.speculative.lookup import History, Lookup
from edgellm.speculative.proposer import Guess, Prompt, Want


def _guess(
    lookup: Lookup, prompt: Sequence[int], answer: Sequence[int], limit: int = 6, prediction: Sequence[int] = ()
) -> Guess | None:
    state = lookup.begin(Prompt(prompt, 0.0, prediction))
    for token in answer:
        lookup.extend(state, [token])
        lookup.propose([Want(state, [*prompt, *answer], 1)])  # as a server asks: once a step
    return lookup.propose([Want(state, [*prompt, *answer], limit)])[0]


def _tokens(guess: Guess | None) -> tuple[int, ...]:
    return guess.tokens if guess is not None else ()


def test_the_prompt_is_copied() -> None:
    guess = _guess(Lookup(None), [1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 2, 3])
    assert _tokens(guess) == (4, 5, 6, 7, 8, 9)


def test_the_answer_repeats_itself() -> None:
    assert _tokens(_guess(Lookup(None), [9, 9], [1, 2, 3, 4, 1, 2], limit=2)) == (3, 4)


def test_the_longest_match_decides() -> None:
    prompt = [1, 2, 3, 50, 0, 7, 2, 3, 60, 0]
    assert _tokens(_guess(Lookup(None), prompt, [1, 2, 3], limit=1)) == (50,)
    assert _tokens(_guess(Lookup(None), prompt, [7, 2, 3], limit=1)) == (60,)


def test_places_that_fit_equally_well_vote() -> None:
    prompt = [9, 1, 2, 3, 4, 8, 1, 2, 5, 6, 7, 1, 2, 3, 4, 7]
    guess = _guess(Lookup(None), prompt, [0, 1, 2], limit=2)
    assert _tokens(guess) == (3, 4)
    assert guess is not None
    agreed, disagreed = (_guess(Lookup(None), p, [0, 1, 2], limit=1) for p in ([9, 1, 2, 3, 8, 1, 2, 3, 8], prompt))
    lookup = Lookup(None)
    assert agreed is not None
    assert disagreed is not None
    chances = [lookup.acceptance.probability(g.evidence[0]) for g in (agreed, disagreed)]
    assert chances[0] > chances[1]


def test_earlier_answers_are_remembered_and_forgotten() -> None:
    lookup = Lookup(History(100))
    lookup.end(lookup.begin(Prompt([1], 0.0)), [5, 6, 7, 8, 9])
    assert _tokens(_guess(lookup, [1], [5, 6, 7])) == (8, 9)
    for _ in range(4):
        lookup.end(lookup.begin(Prompt([1], 0.0)), range(100, 130))
    assert not _guess(lookup, [1], [5, 6, 7])


@given(st.lists(st.lists(st.integers(0, 50), max_size=70), max_size=30), st.integers(1, 100))
def test_the_memory_of_answers_is_bounded(answers: list[list[int]], capacity: int) -> None:
    history = History(capacity)
    for answer in answers:
        history.add(answer)
        assert len(history) <= max(4, capacity)


def test_a_prediction_is_followed_from_its_first_token_on() -> None:
    prediction = [10, 11, 12, 13, 14]
    assert _tokens(_guess(Lookup(None), [1, 2], [10], prediction=prediction)) == (11, 12, 13, 14)


def test_a_prediction_is_taken_up_again_after_an_edit() -> None:
    prediction = [10, 11, 12, 13, 14, 15, 16, 17]
    answer = [10, 11, 99, 98, 14, 15]
    assert _tokens(_guess(Lookup(None), [1, 2], answer, prediction=prediction)) == (16, 17)


def test_of_equal_places_in_a_prediction_the_one_that_is_due_next_is_taken() -> None:
    prediction = [7, 1, 50, 7, 2, 60, 7, 3, 70, 7, 4, 80]
    answer = [7, 1, 50, 99, 7]  # the second line begins after something that was inserted
    assert _tokens(_guess(Lookup(None), [0, 0], answer, limit=2, prediction=prediction)) == (2, 60)


def test_what_fits_is_trusted_more_and_what_does_not_less() -> None:
    prompt = [1, 2, 3, 4] * 3
    chances = {}
    for fits in (True, False):
        lookup = Lookup(None)
        state = lookup.begin(Prompt(prompt, 0.0))
        for _ in range(40):
            (guess,) = lookup.propose([Want(state, [*prompt, 1, 2], 1)])
            assert guess is not None
            lookup.judge(state, guess, [fits])
        (guess,) = lookup.propose([Want(state, [*prompt, 1, 2], 1)])
        assert guess is not None
        chances[fits] = lookup.acceptance.probability(guess.evidence[0])
    assert chances[True] > 0.9
    assert chances[False] < 0.4
