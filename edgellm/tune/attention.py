"""Causal attention for training, with as much of it as multiplications of matrices as can be.

On processors torch's own fused attention takes most of its time in its backward pass. For short sequences, whose scores
fit the cache, products over all heads that share keys take less of it in bfloat16 (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from edgellm.tune.cost import SHORT


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, scale: float, window_tokens: int = 0
) -> Tensor:
    """Causal attention within each sequence; (tokens, heads, head width) each -> (tokens, heads * head width).

    k and v may have fewer heads, which are then shared. With a window, a token sees that many, itself included.
    A sequence at a time: no score between sequences is ever computed.
    """
    outputs, start = [], 0
    hidden: dict[int, Tensor] = {}
    for length in lengths:
        queries, keys, values = (part[start : start + length].transpose(0, 1) for part in (q, k, v))
        if length not in hidden:
            hidden[length] = _hidden(length, window_tokens)
        if length <= SHORT:
            mixed = _Attention.apply(queries, keys, values, hidden[length], scale)
        else:
            mixed = _fused(queries, keys, values, hidden[length], scale)
        outputs.append(mixed.transpose(0, 1).flatten(1))  # (heads, length, head width) ->
        start += length
    return torch.cat(outputs)


def _hidden(length: int, window_tokens: int) -> Tensor:
    """(length, length), bool: what a token, the row, does not see."""
    places = torch.arange(length)
    distance = places[:, None] - places
    hidden = distance < 0
    return hidden | (distance >= window_tokens) if window_tokens else hidden


def _fused(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    share = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
    mixed: Tensor = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=~hidden, scale=scale)[0]
    return mixed


class _Attention(torch.autograd.Function):
    """q: (heads, length, width), k and v: (key heads, length, width). Keeps them and the weights, in their type."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
        heads, length, width = k.shape
        grouped = q.reshape(heads, -1, width)  # (key heads, share * length, width)
        scores = torch.bmm(grouped, k.transpose(1, 2)).float().view(-1, length, length)
        scores.mul_(scale).masked_fill_(hidden, -torch.inf)
        weights = scores.softmax(-1).to(q.dtype).view(heads, -1, length)
        ctx.save_for_backward(grouped, k, v, weights)
        ctx.scale, ctx.shape = scale, q.shape
        return torch.bmm(weights, v).view(q.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, weights = ctx.saved_tensors
        gradient = gradient.reshape(q.shape)
        by_weight = torch.bmm(gradient, v.transpose(1, 2)).float()
        kept = weights.float()
        by_weight.sub_((by_weight * kept).sum(-1, keepdim=True))
        by_score = by_weight.mul_(kept).mul_(ctx.scale).to(q.dtype)
        return (
            torch.bmm(by_score, k).view(ctx.shape),
            torch.bmm(by_score.transpose(1, 2), q),
            torch.bmm(weights.transpose(1, 2), gradient),
            None,
            None,
        )
