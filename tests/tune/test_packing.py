"""Packing: everything once, no pack too large, and as a plain first fit would have it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.tune.packing import assign

ROOM = 32
sizes = st.lists(st.integers(1, ROOM), max_size=60)


def plain_first_fit(sizes: list[int]) -> list[list[int]]:
    """The slow reference."""
    packs: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        for pack in packs:
            if sum(sizes[member] for member in pack) + sizes[index] <= ROOM:
                pack.append(index)
                break
        else:
            packs.append([index])
    return packs


@given(sizes=sizes)
def test_packs_are_those_of_a_plain_first_fit(sizes: list[int]) -> None:
    packs = assign(sizes, ROOM)
    assert packs == plain_first_fit(sizes)
    assert sorted(index for pack in packs for index in pack) == list(range(len(sizes)))


@pytest.mark.parametrize("size", [0, ROOM + 1])
def test_a_size_that_fits_no_pack_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="sizes must be 1 to 32"):
        assign([1, size], ROOM)
