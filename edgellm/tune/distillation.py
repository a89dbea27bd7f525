"""Trains a drafter's adapter on a target's answers: AdamW over the adapter alone, on the pieces of the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from edgellm.errors import ConfigError
from edgellm.tune.decoder import Decoder
from edgellm.tune.drafted import DraftedAnswer, together
from edgellm.tune.lora import Lora
from edgellm.tune.loss import TokenLosses
from edgellm.tune.packing import assign
from edgellm.tune.schedule import learning_rate_at, step_examples
from edgellm.tune.soft_loss import soft_losses

_PACK_TOKENS = 512  # what layers keep for the backward pass goes with it
_CLIP = 1.0  # of the gradient's norm


@dataclass(frozen=True, slots=True)
class Distilled:
    """One step: means over the places that were learnt, by their weights."""

    step: int  # from 1
    loss: float
    accuracy: float  # of places, whatever their weights: the likeliest token was the one that stands there
    places: int
    tokens: int


class Distiller:
    """One adapter in training."""

    def __init__(
        self,
        decoder: Decoder,
        lora: Lora,
        answers: Sequence[DraftedAnswer],
        *,
        epochs: int,
        batch_size: int,
        learning_rate: float,
        seed: int = 0,
    ) -> None:
        """The rate rises to `learning_rate` and falls as the trainer's does. Raises ConfigError for no answers."""
        if not answers or epochs < 1 or batch_size < 1 or not learning_rate > 0:
            raise ConfigError("adaptation needs answers, an epoch, a batch and a learning rate")
        self._decoder, self._lora, self._answers = decoder, lora, answers
        self._batch_size, self._rate, self._seed = batch_size, learning_rate, seed
        self.total_steps = epochs * -(-len(answers) // batch_size)
        self._optimiser = torch.optim.AdamW(
            list(lora.parameters()), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True
        )

    def steps(self) -> Iterator[Distilled]:
        """Trains, a step at each turn."""
        for step in range(self.total_steps):
            yield self._step(step)

    def _step(self, step: int) -> Distilled:
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate_at(step, steps=self.total_steps, height=self._rate)
        numbers = step_examples(step, count=len(self._answers), batch_size=self._batch_size, seed=self._seed)
        sizes = [len(self._answers[number].tokens) for number in numbers]
        whole = sum(float(self._answers[number].weights.sum()) for number in numbers)
        loss, right, places = 0.0, 0, 0
        for members in assign(sizes, max(_PACK_TOKENS, *sizes)):
            found = self._losses([self._answers[numbers[member]] for member in members])
            (found.losses.sum() / whole).backward()
            loss += float(found.losses.detach().sum())
            right += int(found.correct.sum())
            places += len(found.correct)
        torch.nn.utils.clip_grad_norm_(list(self._lora.parameters()), _CLIP)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return Distilled(step + 1, loss / whole, right / places, places, sum(sizes))

    def _losses(self, answers: Sequence[DraftedAnswer]) -> TokenLosses:
        packed, rows, targets = together(answers)
        stream = self._decoder.hidden(packed, self._lora)
        return soft_losses(self._decoder.normalise(stream[rows]), self._decoder.head, targets)
