"""Sequences packed as a tree: tokens that several of them begin with are there, and are computed, once.

Chats begin with the same system prompt, pairs with the same question, the turns of an agent with all turns before.
What a token becomes depends on the tokens before it alone, so each sequence is computed as if it were alone, and a
shared token's gradient is the sum of what each sequence sends back to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tokens = Sequence[int] | NDArray[np.int32]

_LEAST = 4
"""Fewer tokens are not worth a segment: its attention is a call of its own in every layer."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, end) of a pack, which continue the segments `before`, from the first to the nearest."""

    start: int
    end: int
    before: tuple[Segment, ...] = ()

    @property
    def position(self) -> int:
        """Of its first token in its sequences."""
        return sum(one.end - one.start for one in self.before)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Sequences laid out for one pass; none sees another, and each begins at position 0."""

    tokens: Tensor  # (tokens,), int64
    segments: tuple[Segment, ...]  # in the order of their tokens, so that what a segment continues is before it
    ends: tuple[Segment, ...]  # of each sequence the last segment

    @property
    def positions(self) -> Tensor:
        """(tokens,), int64."""
        return torch.cat([torch.arange(one.end - one.start) + one.position for one in self.segments])

    def rows(self, sequence: int) -> Tensor:
        """Where a sequence's tokens are in the pack, (its tokens,), int64."""
        end = self.ends[sequence]
        return torch.cat([torch.arange(one.start, one.end) for one in (*end.before, end)])


def pack(sequences: Sequence[Tokens]) -> Packed:
    """Raises ValueError for an empty sequence, or none."""
    if not sequences or not all(len(one) for one in sequences):
        raise ValueError("a pack needs sequences of at least one token")
    arrays = [np.asarray(one, np.int64) for one in sequences]
    segments: list[Segment] = []
    ends: dict[int, Segment] = {}
    pieces: list[NDArray[np.int64]] = []
    size = 0
    for members, start, end, parent in _grow(arrays):
        before = () if parent is None else (*segments[parent].before, segments[parent])
        segments.append(Segment(size, size + end - start, before))
        pieces.append(arrays[members[0]][start:end])
        size += end - start
        ends |= {member: segments[-1] for member in members if len(arrays[member]) == end}
    order = range(len(arrays))
    return Packed(torch.from_numpy(np.concatenate(pieces)), tuple(segments), tuple(ends[member] for member in order))


def _grow(arrays: Sequence[NDArray[np.int64]]) -> Iterator[tuple[list[int], int, int, int | None]]:
    """Segments, parents first: which sequences have it, from which token of theirs to which, and the parent's number.

    Sequences with fewer than _LEAST tokens more in common go apart at once, those among them that share more together.
    """
    count = 0
    # sequences that have `start` tokens in segments and the first `same` in common
    todo: list[tuple[list[int], int, int, int | None]] = [(list(range(len(arrays))), 0, 0, None)]
    while todo:
        members, start, same, parent = todo.pop()
        same += _common([arrays[member][same:] for member in members])
        whole = [member for member in members if len(arrays[member]) == same]
        if same - start >= _LEAST or len(whole) == len(members):
            yield members, start, same, parent
            start, parent, count = same, count, count + 1
        else:
            for member in whole:
                yield [member], start, same, parent
                count += 1
        groups: dict[int, list[int]] = {}
        for member in members:
            if len(arrays[member]) > same:
                groups.setdefault(int(arrays[member][same]), []).append(member)
        todo += [(group, start, same, parent) for group in reversed(groups.values())]


def _common(arrays: Sequence[NDArray[np.int64]]) -> int:
    """How many tokens all begin with."""
    first, length = arrays[0], min(map(len, arrays))
    for other in arrays[1:]:
        differing = np.flatnonzero(first[:length] != other[:length])
        length = int(differing[0]) if len(differing) else length
    return length
