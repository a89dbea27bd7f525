"""The loss against probabilities of some tokens, the rest of them lumped, without the matrix of all logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgellm.tune.cost import LOGITS_BYTES
from edgellm.tune.loss import TokenLosses, chunked_losses
from edgellm.tune.ops import array, kernels
from edgellm.tune.weights import Matrix

_LEAST = 1e-6  # probability of the rest, as far as it is told from none


@dataclass(frozen=True, slots=True, eq=False)
class SoftTargets:
    """What is wanted at each of some places: probabilities of a few tokens, and how much the place counts.

    Entries are in the order of their places, and a place has none twice for a token. What a place's entries lack to 1
    is the probability of all other tokens together.
    """

    written: Tensor  # (places,), int64: the token that stands there
    weights: Tensor  # (places,), float32
    rows: Tensor  # (entries,), int64: which place
    tokens: Tensor  # (entries,), int64
    probabilities: Tensor  # (entries,), float32, positive

    def part(self, start: int, end: int) -> SoftTargets:
        """Those of the places [start, end)."""
        first, last = torch.searchsorted(self.rows, torch.tensor([start, end])).tolist()
        entries = slice(first, last)
        return SoftTargets(
            self.written[start:end],
            self.weights[start:end],
            self.rows[entries] - start,
            self.tokens[entries],
            self.probabilities[entries],
        )


def soft_losses(hidden: Tensor, head: Matrix, targets: SoftTargets, *, logits_bytes: int = LOGITS_BYTES) -> TokenLosses:
    """weight * KL(targets || softmax(hidden @ head.T)) of each place, all tokens without an entry counting as one.

    hidden: (places, width), float32 or bfloat16. A place whose written token has the probability 1 gets
    weight * -log p of it. Chunks, and gradients made in the same pass, as in loss.token_losses.
    """

    def score(part: slice, logits: Tensor, losses: Tensor, correct: Tensor, gradient: bool) -> None:
        losses.copy_(_chunk(logits, targets.part(part.start, part.stop), correct, gradient))

    return chunked_losses(hidden, head, score, logits_bytes)


def _chunk(logits: Tensor, targets: SoftTargets, correct: Tensor, wanted: bool) -> Tensor:
    """The losses of a chunk, (places,). `wanted`: logits, (places, vocabulary), become their gradient."""
    count, rows, tokens, p = len(logits), targets.rows, targets.tokens, targets.probabilities
    places = torch.arange(count)
    written = logits[places, targets.written].float()
    chosen = logits[rows, tokens].float()
    taken = torch.empty(count)
    kernels().losses(array(logits), array(targets.written), array(taken), array(correct), gradient=wanted)
    log_q = chosen - (written + taken)[rows]  # `taken` is what the written token lacks to log 1
    q = log_q.exp()
    rest_p, rest_q = (1 - torch.zeros(count).index_add(0, rows, part) for part in (p, q))
    rest_p, rest_q = rest_p.clamp(min=0), rest_q.clamp(min=_LEAST)
    losses = torch.xlogy(rest_p, rest_p / rest_q).index_add(0, rows, p * (p.log() - log_q))
    if wanted:  # there, softmax less one for the written token
        logits[places, targets.written] += 1
        logits *= (targets.weights * (1 - rest_p / rest_q))[:, None].to(logits.dtype)
        logits[rows, tokens] = (targets.weights[rows] * (q - p)).to(logits.dtype)
    return losses * targets.weights
