"""Differentiable pieces of a decoder between its products, each computed natively in one pass (kernels/training.h)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgellm.backend.training import Heads, TrainingKernels

Angles = tuple[Tensor, Tensor]
"""Cosine and sine, (tokens, pairs), float32."""


def kernels() -> TrainingKernels:
    """On as many threads as torch."""
    return TrainingKernels(torch.get_num_threads())


def array(tensor: Tensor) -> npt.NDArray[Any]:
    """A contiguous tensor's own memory; of bfloat16 its bits, as uint16."""
    plain = tensor.detach()
    if not plain.is_contiguous():
        raise ValueError("native code takes tensors that lie in one piece")
    return np.asarray(plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        y, scale = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1])
        kernels().norm(_rows(x), array(weight), epsilon, _rows(y), array(scale).reshape(-1))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        by_x = torch.empty_like(x)
        kernels().norm_back(
            _rows(gradient.contiguous()), _rows(x), array(weight), array(scale).reshape(-1), _rows(by_x)
        )
        return by_x, None, None, None


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
        result = torch.empty_like(gate)
        kernels().gate(_flat(gate), _flat(up), gelu, _flat(result))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
        kernels().gate_back(
            _flat(gradient.contiguous()), _flat(gate), _flat(up), ctx.gelu, _flat(by_gate), _flat(by_up)
        )
        return by_gate, by_up, None


def gated(gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """silu(gate) * up, or tanh-GELU: (tokens, hidden), all of one type, contiguous. Keeps both (arXiv 2002.05202)."""
    result: Tensor = _Gate.apply(gate, up, gelu)
    return result


class _Turn(torch.autograd.Function):
    """From (tokens, heads, width) to (heads / share, tokens * share, width), or `back`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Angles, how: Heads, back: bool) -> Tensor:
        ctx.angles, ctx.how, ctx.back = angles, how, back
        return _turned(x, angles, how, back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _turned(gradient.contiguous(), ctx.angles, ctx.how, not ctx.back), None, None, None


def _turned(x: Tensor, angles: Angles, how: Heads, back: bool) -> Tensor:
    cosine, sine = angles
    tokens, width = len(cosine), x.shape[-1]
    shape = (tokens, how.heads, width) if back else (how.heads // how.share, tokens * how.share, width)
    result = x.new_empty(shape)
    kernels().turn(how, array(x), array(cosine), array(sine), array(result), back=back)
    return result


def grouped(x: Tensor, angles: Angles | None = None, *, share: int = 1, interleaved: bool = False) -> Tensor:
    """Heads turned by rotary embeddings (arXiv 2104.09864), if there are angles, and laid out for attention.

    x: (tokens, heads, head width) -> (heads / share, tokens * share, head width): heads that share keys are together.
    The first 2 * pairs elements of a head are turned; pairs are neighbours if `interleaved`, else half the turned width
    apart. The result has x's type.
    """
    how = Heads(x.shape[1], share, interleaved)
    result: Tensor = _Turn.apply(x, angles or _no_angles(len(x)), how, False)
    return result


def ungrouped(x: Tensor, *, share: int) -> Tensor:
    """(groups, tokens * share, head width) -> (tokens, groups * share * head width)."""
    groups, rows, _ = x.shape
    result: Tensor = _Turn.apply(x, _no_angles(rows // share), Heads(groups * share, share), True)
    return result.flatten(1)


def _no_angles(tokens: int) -> Angles:
    none = torch.empty(tokens, 0)
    return none, none


def _rows(x: Tensor) -> npt.NDArray[Any]:
    return array(x).reshape(-1, x.shape[-1])


def _flat(x: Tensor) -> npt.NDArray[Any]:
    return array(x).reshape(-1)
