"""Overlapping windows over a long text: what stands anywhere in it is read at full attention, padding or not."""

from __future__ import annotations


def windows(length: int, *, size: int, overlap: int) -> list[tuple[int, int]]:
    """Begins and ends of windows that cover `length` tokens, each of `size` tokens (the only one may be shorter),
    neighbours sharing at least `overlap`. So a request of at most `overlap` tokens is whole in one of them."""
    if not 0 <= overlap < size:
        raise ValueError("overlap must be less than size, and not negative")
    if length <= size:
        return [(0, length)]
    steps = -(-(length - size) // (size - overlap))
    return [(begin, begin + size) for begin in (step * (length - size) // steps for step in range(steps + 1))]
