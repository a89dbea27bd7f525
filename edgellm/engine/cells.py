"""Bookkeeping of KV cells: which are in use, and by how many sequences each is shared.

A mirror, in plain Python, of what llama.cpp's unified cache does, so that the scheduler knows before a step whether the
step fits. A sequence's cells are a list of handles, one for each position it holds.
"""

from __future__ import annotations

from collections.abc import Iterable


class CellLedger:
    """Reference counts of `capacity` cells."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._references = [0] * capacity
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def free(self) -> int:
        """Cells that no sequence holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Cells that at least one sequence holds."""
        return self.capacity - len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether `count` cells are free."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free cells; check `can_allocate` first."""
        taken = [self._free.pop() for _ in range(count)]
        for cell in taken:
            self._references[cell] = 1
        return taken

    def share(self, cells: Iterable[int]) -> None:
        """One more sequence holds these cells."""
        for cell in cells:
            self._references[cell] += 1

    def release(self, cells: Iterable[int]) -> int:
        """One sequence less holds these cells. Returns how many of them became free."""
        freed = 0
        for cell in cells:
            self._references[cell] -= 1
            if self._references[cell] == 0:
                self._free.append(cell)
                freed += 1
        return freed

    def exclusive(self, cells: Iterable[int]) -> int:
        """How many of these cells would become free on `release`."""
        return sum(1 for cell in cells if self._references[cell] == 1)
