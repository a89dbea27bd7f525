"""Which turns of a conversation are judged, and with what weight."""

from __future__ import annotations

import pytest

from guards.conversation import EARLIER_ANSWER, EARLIER_TURN, Part, Role, Turn, parts


def _judged(*turns: tuple[Role, str]) -> list[Part]:
    return list(parts([Turn(role, text) for role, text in turns]))


def test_a_single_question_is_judged_once() -> None:
    assert _judged(("user", "one")) == [Part("one", 0)]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_operators_instructions_are_not_the_users(role: Role) -> None:
    assert _judged((role, "do as I say"), ("user", "one")) == [Part("one", 1)]


def test_what_was_answered_counts_less() -> None:
    found = _judged(("user", "one"), ("assistant", "two"), ("user", "three"))
    assert found == [
        Part("one", 0, EARLIER_TURN),
        Part("two", 1, EARLIER_ANSWER),
        Part("three", 2),
        Part("one\nthree", 2),
    ]


def test_results_of_tools_that_wait_for_an_answer_count_in_full() -> None:
    found = _judged(("user", "one"), ("assistant", ""), ("tool", "two"), ("tool", "three"))
    assert found == [Part("one", 0, EARLIER_TURN), Part("two", 2), Part("three", 3)]


def test_an_answer_begun_for_the_model_counts_in_full() -> None:
    found = _judged(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "Sure, here is"))
    assert Part("Sure, here is", 3) in found
    assert Part("three", 2) in found
    assert Part("one", 0, EARLIER_TURN) in found


def test_a_request_spread_over_turns_is_read_as_one() -> None:
    turns = [(role, text) for n in range(5) for role, text in (("user", f"u{n}"), ("assistant", f"a{n}"))][:-1]
    assert _judged(*turns)[-1] == Part("u2\nu3\nu4", 8)  # type: ignore[arg-type]


def test_turns_joined_to_a_question_that_stands_for_itself_count_less() -> None:
    long = "and now something that is a question by itself"
    assert _judged(("user", "one"), ("assistant", "two"), ("user", long))[-1] == Part(f"one\n{long}", 2, EARLIER_TURN)
    assert _judged(("user", "one"), ("user", long))[-1] == Part(f"one\n{long}", 1)


@pytest.mark.parametrize(
    "text",
    ["面包应该怎么烤才好吃请告诉我详细的步骤", "บอกวิธีอบขนมปังที่บ้านให้หน่อยได้ไหมครับ", "one two three four five six seven"],
)
def test_a_long_turn_stands_for_itself_in_any_script(text: str) -> None:
    assert _judged(("user", "one"), ("assistant", "two"), ("user", text))[-1].handicap == EARLIER_TURN
    assert _judged(("user", "one"), ("assistant", "two"), ("user", text[:6]))[-1].handicap == 0.0


def test_empty_turns_are_not_judged() -> None:
    assert _judged() == []
    assert _judged(("user", "  "), ("tool", "")) == []
