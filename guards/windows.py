"""Overlapping windows over a long text: what stands anywhere in it is read at full attention, padding or not."""

from __future__ import annotations

import re

# Chinese and Japanese put no space after a stop; NFKC makes their other stops ASCII ones. Danda, Arabic and Urdu stops.
_END = re.compile(r"(?<=[.!?;:])\s+|(?<=[\u3002\u0964\u0965\u061f\u06d4])|(?<=[!?;:])(?=[\u3040-\u30ff\u3400-\u9fff])")


def windows(length: int, *, size: int, overlap: int) -> list[tuple[int, int]]:
    """Begins and ends of windows that cover `length` tokens, each of `size` tokens (the only one may be shorter),
    neighbours sharing at least `overlap`. So a request of at most `overlap` tokens is whole in one of them."""
    if not 0 <= overlap < size:
        raise ValueError("overlap must be less than size, and not negative")
    if length <= size:
        return [(0, length)]
    steps = -(-(length - size) // (size - overlap))
    return [(begin, begin + size) for begin in (step * (length - size) // steps for step in range(steps + 1))]


def sentences(text: str) -> list[tuple[int, int]]:
    """Begins and ends of what stops end, in characters: roughly, for nothing depends on a sentence being one."""
    ends = [*(match.span() for match in _END.finditer(text)), (len(text), len(text))]
    begins = [0, *(end for _, end in ends[:-1])]
    return [(begin, end) for begin, (end, _) in zip(begins, ends, strict=True) if end > begin]
