"""The ledger of cells against a plain count."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from edgellm.engine.cells import CellLedger


def test_a_cell_is_free_when_its_last_holder_lets_go() -> None:
    ledger = CellLedger(8)
    cells = ledger.allocate(5)
    assert len(set(cells)) == 5
    ledger.share(cells[:3])
    assert (ledger.used, ledger.free, ledger.exclusive(cells)) == (5, 3, 2)
    assert not ledger.can_allocate(4)
    assert ledger.release(cells) == 2
    assert ledger.release(cells[:3]) == 3
    assert (ledger.used, ledger.can_allocate(8)) == (0, True)


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release", "cut"]), st.integers(0, 9)), max_size=60))
def test_used_is_the_number_of_distinct_cells_held(actions: list[tuple[str, int]]) -> None:
    ledger = CellLedger(16)
    holders: list[list[int]] = []
    for action, number in actions:
        if action == "allocate" and ledger.can_allocate(number):
            holders.append(ledger.allocate(number))
        elif action == "share" and holders:
            cells = holders[number % len(holders)][:number]
            ledger.share(cells)
            holders.append(list(cells))
        elif action == "release" and holders:
            cells = holders.pop(number % len(holders))
            exclusive = ledger.exclusive(cells)
            assert ledger.release(cells) == exclusive
        elif action == "cut" and holders:
            cells = holders[number % len(holders)]
            ledger.release(cells[number:])
            del cells[number:]
        held = Counter(cell for cells in holders for cell in cells)
        assert ledger.used == len(held)
        assert ledger.free == 16 - len(held)
        assert all(ledger.exclusive([cell]) == (count == 1) for cell, count in held.items())
