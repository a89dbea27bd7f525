"""The second reading of a text in which words are hidden."""

from __future__ import annotations

import base64
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.disguises import Undisguiser

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "a",
    "in",
    "i",
    "is",
    "that",
    "how",
    "make",
    "cake",
    "bake",
    "bread",
    "need",
    "some",
    "answer",
    "please",
    "for",
    "me",
    "eat",
    "sour",
    "dough",
]
QUESTION = "how to make a cake"


@pytest.fixture(scope="module")
def reader() -> Undisguiser:
    return Undisguiser(WORDS)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("h0w t0 m4k3 a c@k3", QUESTION),
        ("i n33d $ome bre4d!", "i need some bread!"),
        ("h0w 70 m4k3 4 c4k3", QUESTION),
        ("h0w to make 4 cake", "how to make 4 cake"),
        ("h o w  t o  m a k e  a  c a k e", QUESTION),
        ("h.o.w t.o m.a.k.e a c.a.k.e", "how to make a cake"),
        ("H-o-w to m-a-k-e a c_a_k_e", "how to make a cake"),
        ("how to make a c a k e please", "how to make a cake please"),
        ("howtomakeacakeplease", QUESTION + " please"),
        ("Howtomakeacakeplease? I need some.", "how to make a cake please? i need some."),
        ("answer this: " + base64.b64encode(QUESTION.encode()).decode(), "answer this: " + QUESTION),
        (
            "answer this: " + base64.urlsafe_b64encode(QUESTION.encode()).decode().rstrip("="),
            "answer this: " + QUESTION,
        ),
        ("answer this: " + base64.b64encode(base64.b64encode(QUESTION.encode())).decode(), "answer this: " + QUESTION),
        (QUESTION.encode().hex(), QUESTION),
        (QUESTION.encode().hex(" "), QUESTION),
        (urllib.parse.quote(QUESTION), QUESTION),
        (base64.b64encode(b"h0w t0 m4k3 a c4k3").decode(), QUESTION),
    ],
)
def test_what_is_hidden_is_read(reader: Undisguiser, text: str, read: str) -> None:
    found = reader.undisguised(text)
    assert found is not None
    assert found.lower() == read


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        "python3, h2o, mp3, gpt4 and covid19 in 2024",
        "commit 3f786850e387550fdab836ed7e6dc881de23001b",
        "https://example.com/a/b/c?x=1",
        "internationalisationalisation",
        "$100 for 2 cakes!",
        "x = 3; y = [1, 2, 3]",
        "",
        "howToMakeACakePlease in unbelievablestringently",
    ],
)
def test_where_nothing_is_hidden_there_is_no_second_reading(reader: Undisguiser, text: str) -> None:
    assert reader.undisguised(text) is None


def test_letters_run_together_are_cut_into_words(reader: Undisguiser) -> None:
    assert reader.segmented("howtomakeacake") == QUESTION
    assert reader.segmented("") == ""


@pytest.mark.parametrize("unit", ["x", "a%41", "a ", "ab", "QUJD", ".", "-", "_", "a.", "ab ", "%", "4"])
def test_a_long_run_is_read_in_linear_time(reader: Undisguiser, unit: str) -> None:
    """No clock: what takes the square of the time would not end here."""
    reader.undisguised(unit * 200_000 + "\u00e9")


@given(st.text(max_size=200))
def test_any_text_can_be_read(text: str) -> None:
    found = Undisguiser(WORDS).undisguised(text)
    assert found is None or found != text
