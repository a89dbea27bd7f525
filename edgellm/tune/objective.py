"""What is made small: the loss of a pack of sequences, for answers to learn and for pairs to prefer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from edgellm.tune.batches import Batch
from edgellm.tune.loss import TokenLosses

BETA = 0.1
"""Of direct preference optimisation, if nothing else is asked for: how dear leaving the base model is."""


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over a pack; the trainer divides them by the sum of `weight` over the step."""

    loss: Tensor  # a number, differentiable
    right: float  # likeliest tokens that were right, or pairs preferred rightly
    weight: int  # answer tokens, or pairs
    margin: float = 0.0  # of the rewards of pairs


def supervised(found: TokenLosses) -> Score:
    """The sum of -log p over the answers' tokens."""
    return Score(found.losses.sum(), float(found.correct.sum()), len(found.losses))


def log_likelihoods(losses: Tensor, batch: Batch) -> Tensor:
    """log p of each sequence's answer, (sequences,), differentiable."""
    return torch.zeros(len(batch.packed.ends)).index_add(0, batch.owners, -losses)


def preferences(found: TokenLosses, batch: Batch, reference: Tensor, beta: float) -> Score:
    """Direct preference optimisation (arXiv 2305.18290, equation 7) over pairs: preferred and rejected in turn.

    reference: log p of each sequence's answer under the base model alone, (sequences,).
    """
    rewards = beta * (log_likelihoods(found.losses, batch) - reference)
    margins = rewards[::2] - rewards[1::2]  # (pairs,)
    right = float((margins > 0).sum())
    return Score(-F.logsigmoid(margins).sum(), right, len(margins), float(margins.detach().sum()))
