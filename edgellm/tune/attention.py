"""Causal attention for training: products of matrices, and what is between them natively.

Heads that share keys are rows of one product, so that keys are read once. On processors torch's own fused attention
takes most of its time in its backward pass; these products take less of it (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgellm.backend.training import Sight
from edgellm.tune.cost import QUERIES, SHORT
from edgellm.tune.ops import array, kernels
from edgellm.tune.prefix_tree import Segment


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens [start, end) of a pack, and where the keys lie that they see."""

    start: int
    end: int
    keys: tuple[slice, ...]  # the last ones are those of the tokens themselves
    past: int  # how many keys precede the first token's own


def blocks_of(segments: Sequence[Segment], window_tokens: int = 0) -> tuple[Block, ...]:
    """What attention goes through, for `window_tokens` as in `attention`.

    Blocks are of QUERIES tokens at most, for all of them pay for the keys that only the last one sees.
    """
    return tuple(
        _block(segment, start, min(start + QUERIES, segment.end), window_tokens)
        for segment in segments
        for start in range(segment.start, segment.end, QUERIES)
    )


def _block(segment: Segment, start: int, end: int, window_tokens: int) -> Block:
    past = segment.position + start - segment.start
    unseen = max(0, past - window_tokens + 1) if window_tokens else 0
    keys, skipped = [], unseen
    for first, last in (*((one.start, one.end) for one in segment.before), (segment.start, end)):
        cut = min(skipped, last - first)
        skipped -= cut
        if cut < last - first:
            keys.append(slice(first + cut, last))
    return Block(start, end, tuple(keys), past - unseen)


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], *, share: int, scale: float, window_tokens: int = 0
) -> Tensor:
    """Causal attention within each sequence of a pack.

    q: (groups, tokens * share, head width), the `share` heads of a token one after the other; k, v: (groups, tokens,
    head width); of one type, float32 or bfloat16. The result is like q. With a window, a token sees that many, itself
    included. No score between sequences is ever computed. Weights over at most SHORT keys are kept for backward, others
    are computed again.
    """
    mixed: Tensor = _Attention.apply(q, k, v, tuple(blocks), share, scale, window_tokens)
    return mixed


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...], share: int, scale: float, window: int
    ) -> Tensor:
        ctx.how = (blocks, share, scale, window)
        result = torch.empty_like(q)
        kept = []
        for block in blocks:
            keys, values = _seen(k, block), _seen(v, block)
            rows = slice(block.start * share, block.end * share)
            weights = _weights(q[:, rows], keys, Sight(share, block.past, window, scale))
            result[:, rows] = torch.bmm(weights, values)
            if keys.shape[1] <= SHORT:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        blocks, share, scale, window = ctx.how
        by_q, by_k, by_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in blocks:
            keys, values = _seen(k, block), _seen(v, block)
            rows = slice(block.start * share, block.end * share)
            sight = Sight(share, block.past, window, scale)
            weights = kept.pop(0) if keys.shape[1] <= SHORT else _weights(q[:, rows], keys, sight)
            part = gradient[:, rows]
            _add(by_v, block, torch.bmm(weights.transpose(1, 2), part))
            by_score = torch.bmm(part, values.transpose(1, 2))
            kernels().softmax_back(sight, array(weights), array(by_score))
            by_q[:, rows] = torch.bmm(by_score, keys)
            _add(by_k, block, torch.bmm(by_score.transpose(1, 2), q[:, rows]))
        return by_q, by_k, by_v, None, None, None, None


def _weights(q: Tensor, keys: Tensor, sight: Sight) -> Tensor:
    """(groups, rows, keys), contiguous."""
    scores = torch.bmm(q, keys.transpose(1, 2))
    kernels().softmax(sight, array(scores))
    return scores


def _seen(part: Tensor, block: Block) -> Tensor:
    """The rows of a block's keys."""
    if len(block.keys) == 1:
        return part[:, block.keys[0]]
    return torch.cat([part[:, one] for one in block.keys], 1)


def _add(total: Tensor, block: Block, part: Tensor) -> None:
    """Adds the gradients of a block's keys where they belong."""
    first = 0
    for one in block.keys:
        count = one.stop - one.start
        total[:, one] += part[:, first : first + count]
        first += count
