"""Products with frozen quantised matrices and their adapters, several of one input at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgellm.tune.weights import Matrix


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One of the matrices."""

    matrix: Matrix  # (out, in)
    bias: Tensor | None  # (out,), float32, frozen
    pair: tuple[Tensor, Tensor] | None  # its adapter, if it is trained: A (rank, in), B (out, rank)


def products(x: Tensor, parts: Sequence[Part], scale: float) -> tuple[Tensor, ...]:
    """x @ matrix.T + bias + scale * x @ A.T @ B.T for each part: (tokens, in) -> (tokens, out) each, in x's type.

    x is float32 or bfloat16. Between forward and backward nothing is kept of the matrices, which are expanded again,
    and x only where an adapter needs it. What has nothing to learn, and an x without a graph, has no graph.
    """
    pairs = [tensor for part in parts if part.pair is not None for tensor in part.pair]
    found: tuple[Tensor, ...] = _Products.apply(x, tuple(parts), scale, *pairs)
    return found


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: tuple[Part, ...], scale: float, *pairs: Tensor) -> tuple[Tensor, ...]:
        ctx.parts, ctx.scale = parts, scale
        ctx.set_materialize_grads(False)
        results, lows = [], []
        for part in parts:
            y = x @ part.matrix.expand(x.dtype).T
            if part.bias is not None:
                y += part.bias.to(y.dtype)
            if part.pair is not None:
                a, b = (one.to(x.dtype) for one in part.pair)
                lows.append(x @ a.T)  # (tokens, rank)
                y.addmm_(lows[-1], b.T, alpha=scale)
            results.append(y)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(*(y for y, part in zip(results, parts, strict=True) if part.pair is None))
        ctx.save_for_backward(x if pairs else None, *lows, *pairs)  # pairs, so that torch notices if they change
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        lows = iter(kept)
        by_x: Tensor | None = None
        by_pairs: list[Tensor | None] = []
        for part, gradient in zip(ctx.parts, gradients, strict=True):
            if gradient is not None and ctx.needs_input_grad[0]:
                by_x = _add_product(by_x, gradient, part.matrix.expand(gradient.dtype))
            if part.pair is None:
                continue
            low = next(lows)
            if gradient is None:
                by_pairs += [None, None]
                continue
            a, b = (one.to(gradient.dtype) for one in part.pair)
            by_low = (gradient @ b).mul_(ctx.scale)
            by_pairs += [(by_low.T @ x).float(), (gradient.T @ low).float().mul_(ctx.scale)]
            if by_x is not None:
                by_x.addmm_(by_low, a)
        return by_x, None, None, *by_pairs


def _add_product(total: Tensor | None, x: Tensor, matrix: Tensor) -> Tensor:
    return x @ matrix if total is None else total.addmm_(x, matrix)
