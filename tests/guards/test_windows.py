"""Windows cover a text, and a request that fits into what they share is whole in one of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.text import clean
from guards.windows import sentences, windows


@given(st.integers(0, 3000), st.integers(2, 200), st.data())
def test_every_run_as_long_as_the_overlap_is_whole_somewhere(length: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    spans = windows(length, size=size, overlap=overlap)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert all(end - begin == min(size, length) for begin, end in spans)
    assert all(before[1] - after[0] >= overlap for before, after in itertools.pairwise(spans))
    assert len(spans) <= max(1, -(-length // (size - overlap)))


@pytest.mark.parametrize("overlap", [-1, 10, 11])
def test_an_overlap_that_cannot_be_is_refused(overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        windows(100, size=10, overlap=overlap)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("one", ["one"]),
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("No stop at the end. none", ["No stop at the end.", "none"]),
        ("A list: first; second", ["A list:", "first;", "second"]),
        ("3.5 is a number.", ["3.5 is a number."]),
        ("今天很好。明天呢？真的！好吧", ["今天很好。", "明天呢?", "真的!", "好吧"]),
        ("यह कैसे होता है। बताइए", ["यह कैसे होता है।", "बताइए"]),
        ("كيف حالك؟ شكرا", ["كيف حالك؟", "شكرا"]),
        ("10:30 or 1;2", ["10:30 or 1;2"]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    text = clean(text)
    assert [text[begin:end].strip() for begin, end in sentences(text)] == expected


@given(st.text(alphabet="ab. ?!。"))
def test_sentences_hold_all_but_space(text: str) -> None:
    places = sentences(text)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(places))
    assert "".join(text[begin:end] for begin, end in places).replace(" ", "") == text.replace(" ", "")
