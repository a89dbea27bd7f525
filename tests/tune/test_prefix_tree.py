"""Packs as trees: every sequence is whole, and what is shared is there once."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from edgellm.tune.prefix_tree import _LEAST, Packed, pack  # noqa: E402

SYSTEM, QUESTION = list(range(100, 120)), list(range(200, 210))


def _sequences(packed: Packed) -> list[list[int]]:
    return [packed.tokens[packed.rows(number)].tolist() for number in range(len(packed.ends))]


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.lists(st.integers(0, 2), max_size=12)).map(lambda it: [7] * it[0] + it[1]),
        min_size=1,
        max_size=12,
    )
)
def test_every_sequence_is_in_the_pack(sequences: list[list[int]]) -> None:
    sequences = [one for one in sequences if one] or [[1]]
    packed = pack(sequences)
    assert _sequences(packed) == sequences
    for number, sequence in enumerate(sequences):
        assert packed.positions[packed.rows(number)].tolist() == list(range(len(sequence)))
    assert [one.start for one in packed.segments] == [0, *(one.end for one in packed.segments[:-1])]
    assert packed.segments[-1].end == len(packed.tokens) <= sum(map(len, sequences))
    for segment in packed.segments:
        assert segment.end > segment.start
        assert all(earlier.end <= segment.start for earlier in segment.before)


def test_what_sequences_begin_with_is_there_once() -> None:
    one, other = [*SYSTEM, *QUESTION, 1, 2], [*SYSTEM, *QUESTION, 3, 4, 5]
    packed = pack([one, other, [*SYSTEM, 6], one])
    assert len(packed.tokens) == len(SYSTEM) + len(QUESTION) + 2 + 3 + 1
    assert packed.ends[0] is packed.ends[3]
    system, question = packed.ends[0].before
    assert (system.end - system.start, question.end - question.start) == (len(SYSTEM), len(QUESTION))
    assert packed.ends[2].before == (system,)


def test_few_shared_tokens_are_not_worth_a_segment() -> None:
    few = SYSTEM[: _LEAST - 1]
    assert len(pack([[*few, 1], [*few, 2]]).tokens) == 2 * _LEAST
    # but those that share more are together although all share few
    packed = pack([[*few, 1], [*few, 2, *QUESTION], [*few, 2, *QUESTION, 9]])
    assert len(packed.tokens) == _LEAST + (_LEAST + len(QUESTION)) + 1


def test_a_pack_needs_tokens() -> None:
    for empty in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            pack(empty)
