"""Things of various sizes shared out into few packs of one size."""

from __future__ import annotations

from collections.abc import Sequence


def assign(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Which indices into `sizes` share a pack of size `room`: first-fit decreasing, at most 11/9 of the fewest packs
    and a bit (Johnson 1973). Raises ValueError if one does not fit."""
    if any(not 0 < size <= room for size in sizes):
        raise ValueError(f"sizes must be 1 to {room}")
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    rooms = _Rooms(len(sizes), room)
    packs: list[list[int]] = []
    for index in order:
        place = rooms.take(sizes[index])
        if place == len(packs):
            packs.append([])
        packs[place].append(index)
    return packs


class _Rooms:
    """The room left in up to `count` packs, in a tree whose nodes know the most below: a first fit in log(count)."""

    def __init__(self, count: int, room: int) -> None:
        self._leaves = 1 << max(count - 1, 0).bit_length()
        self._most = [room] * (2 * self._leaves)

    def take(self, size: int) -> int:
        """The first pack with room for `size`, which it then lacks."""
        node = 1
        while node < self._leaves:
            node = 2 * node if self._most[2 * node] >= size else 2 * node + 1
        pack = node - self._leaves
        self._most[node] -= size
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return pack
