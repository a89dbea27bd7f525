"""Differentiable pieces of a decoder that keep less for backward than torch's own compositions of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        weighted = gradient * weight
        along = (weighted * x).mean(-1, keepdim=True).mul_(scale * scale)
        return (weighted - x * along).mul_(scale), None, None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight over the last dimension, as `dtype`; x and weight are float32, the weight frozen.

    arXiv 1910.07467. Keeps x and one number a row.
    """
    result: Tensor = _Norm.apply(x, weight, epsilon, dtype)
    return result


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        if ctx.gelu:
            activated = F.gelu(gate, approximate="tanh")
            inner = torch.ops.aten.gelu_backward(gradient * up, gate, approximate="tanh")
        else:
            activated = F.silu(gate)
            inner = torch.ops.aten.silu_backward(gradient * up, gate)
        return inner, gradient * activated, None


def gated(gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """silu(gate) * up, or tanh-GELU: (tokens, hidden), all of one type. Keeps gate and up (arXiv 2002.05202)."""
    result: Tensor = _Gate.apply(gate, up, gelu)
    return result


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary embedding of the first 2 * pairs elements of each head (arXiv 2104.09864).

    x: (tokens, heads, head width); cosine, sine: (tokens, 1, pairs), float32. Pairs are neighbours if `interleaved`,
    else half the turned width apart. The result has x's type.
    """
    width = 2 * cosine.shape[-1]
    turned = x[..., :width].float()
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    one, two = first * cosine - second * sine, second * cosine + first * sine
    both = torch.stack((one, two), -1).flatten(-2) if interleaved else torch.cat((one, two), -1)
    both = both.to(x.dtype)
    return both if width == x.shape[-1] else torch.cat((both, x[..., width:]), -1)
