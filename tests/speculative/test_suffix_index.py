"""The suffix index against a search through the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgellm.speculative.suffix_index import CANDIDATES, GAP, LONGEST, SuffixIndex

_TOKENS = st.lists(st.integers(0, 3) | st.just(GAP), max_size=120)


def _searched(text: list[int], context: list[int], order: int) -> list[tuple[int, int]]:
    """(place, length) of every place before which at least `order` of the last tokens stand, newest first."""
    found = []
    for place in range(len(text) - 1, -1, -1):
        length = 0
        while length < min(LONGEST, place, len(context)) and text[place - 1 - length] == context[-1 - length]:
            length += 1
        if length >= order and text[place] != GAP:
            found.append((place, length))
    return found


@given(_TOKENS, st.lists(st.integers(0, 3), max_size=40), st.integers(1, 3))
def test_it_finds_what_a_search_finds(text: list[int], context: list[int], order: int) -> None:
    index = SuffixIndex(order, text)
    found = [(match.place, match.length) for match in index.find(context, candidates=len(text) + 1)]
    assert found == _searched(text, context, order)
    assert [(match.place, match.length) for match in index.find(context)] == found[:CANDIDATES]


@given(st.lists(_TOKENS, max_size=6), st.lists(st.integers(0, 3), min_size=2, max_size=8))
def test_a_text_that_comes_in_pieces_is_one_text(pieces: list[list[int]], context: list[int]) -> None:
    index = SuffixIndex(2)
    for piece in pieces:
        index.extend(piece)
    whole = SuffixIndex(2, [token for piece in pieces for token in piece])
    assert list(index.text) == list(whole.text)
    assert [m.place for m in index.find(context)] == [m.place for m in whole.find(context)]


def test_nothing_matches_across_a_gap() -> None:
    index = SuffixIndex(2, [1, 2, 3, GAP, 4, 5, 6])
    assert not index.find([3, 4])
    assert [match.length for match in index.find([1, 2, 3, 4, 5])] == [2]


def test_large_token_ids_are_told_apart() -> None:
    index = SuffixIndex(2, [262_143, 262_142, 7, 262_142, 262_143, 8])
    assert [match.place for match in index.find([262_143, 262_142])] == [2]
