"""Cross-entropy over a large vocabulary without the matrix of all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgellm.tune.cost import LOGITS_BYTES
from edgellm.tune.ops import array, kernels
from edgellm.tune.weights import Matrix

_BLOCK_ROWS = 8192  # of the output matrix, expanded at a time


class TokenLosses(NamedTuple):
    """One number for each row."""

    losses: Tensor  # (tokens,), float32, differentiable
    correct: Tensor  # (tokens,), bool: the likeliest token is the target


def token_losses(hidden: Tensor, head: Matrix, targets: Tensor, *, logits_bytes: int = LOGITS_BYTES) -> TokenLosses:
    """-log softmax(hidden @ head.T)[target] of each row.

    hidden: (tokens, width), float32 or bfloat16, only rows whose token is part of an answer; targets: (tokens,), int64.
    Tokens go in chunks, the output matrix in blocks of rows. Each row's gradient is made in the same pass, as long as
    its logits are there, which it takes the place of, and kept, (tokens, width): a loss depends on its own row alone,
    so backward only scales it. Nothing of it is done where hidden has no graph.
    """

    def score(part: slice, logits: Tensor, losses: Tensor, correct: Tensor, gradient: bool) -> None:
        kernels().losses(array(logits), array(targets[part]), array(losses), array(correct), gradient=gradient)

    return chunked_losses(hidden, head, score, logits_bytes)


Score = Callable[[slice, Tensor, Tensor, Tensor, bool], None]
"""(rows, their logits, losses, correct, gradient): fills in losses and correct; with `gradient`, the logits become what
the losses change by with them."""


def chunked_losses(hidden: Tensor, head: Matrix, score: Score, logits_bytes: int) -> TokenLosses:
    """What `score` makes of hidden @ head.T, of some rows at a time: `logits_bytes` of logits."""
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    return TokenLosses(*_Losses.apply(hidden, head, score, logits_bytes, wanted))


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Matrix, score: Score, logits_bytes: int, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        chunk = max(1, logits_bytes // (head.rows * hidden.element_size()))
        gradient = torch.empty_like(hidden) if wanted else None
        losses, correct = torch.empty(len(hidden)), torch.empty(len(hidden), dtype=torch.bool)
        for start in range(0, len(hidden), chunk):
            part = slice(start, min(start + chunk, len(hidden)))
            logits = _chunk_logits(hidden[part], head)
            score(part, logits, losses[part], correct[part], wanted)
            if gradient is not None:
                gradient[part] = _input_gradient(logits, head)
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(gradient)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (kept,) = ctx.saved_tensors
        return (kept * gradient[:, None]).to(kept.dtype), None, None, None, None


def _chunk_logits(hidden: Tensor, head: Matrix) -> Tensor:
    """The logits of a chunk, (tokens, vocabulary), in hidden's type."""
    logits = hidden.new_empty(len(hidden), head.rows)
    for start in range(0, head.rows, _BLOCK_ROWS):
        rows = head.expand(hidden.dtype, start, start + _BLOCK_ROWS)
        torch.mm(hidden, rows.T, out=logits[:, start : start + _BLOCK_ROWS])
    return logits


def _input_gradient(by_logits: Tensor, head: Matrix) -> Tensor:
    """by_logits @ head, (tokens, width), summed as float32."""
    result = torch.zeros(len(by_logits), head.columns)
    for start in range(0, head.rows, _BLOCK_ROWS):
        rows = head.expand(by_logits.dtype, start, start + _BLOCK_ROWS)
        result += by_logits[:, start : start + _BLOCK_ROWS] @ rows
    return result
