"""What "auto" comes to: the trainer's own choices, measured on SmolLM2 (docs/benchmarks.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgellm.tune.spec import RunSpec

RANK = 16
ALPHA_RANKS = 2.0  # alpha, in ranks
_RATE_WIDTH = 1.15
"""The learning rate for a multiplier of 1, times the model's width. Wider models want smaller steps (arXiv 2203.03466):
2e-3 did better than 1e-3 for SmolLM2 of width 576, and 3e-4 is usual at 4096."""

_RATE_MAX = 2e-3
_PREFERENCE_SHARE = 0.1  # of that rate for dpo, which forgets the model's language when it hurries

_EPOCHS = 3
_STEPS_MIN = 40  # small files are read more often, until there are so many steps
_EPOCHS_MAX = 10
_BATCH_MAX = 8
_CHECKPOINT_STEPS = 10


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """A run's numbers, all decided."""

    epochs: int
    batch_size: int
    learning_rate: float
    learning_rate_multiplier: float
    rank: int
    alpha: float
    checkpoint_steps: int


def learning_rate(spec: RunSpec, width: int) -> float:
    """For a model of that width."""
    share = _PREFERENCE_SHARE if spec.method == "dpo" else 1.0
    return share * min(_RATE_MAX, _RATE_WIDTH / width) * (spec.learning_rate_multiplier or 1.0)


def decide(spec: RunSpec, examples: int, width: int) -> Hyperparameters:
    """What the spec says, and the trainer's choice for the rest, for so many examples and a model of that width."""
    batch = spec.batch_size or max(1, min(_BATCH_MAX, examples // 16))
    batch = min(batch, examples)
    steps = -(-examples // batch)
    rank = spec.rank or RANK
    return Hyperparameters(
        epochs=spec.epochs or max(_EPOCHS, min(_EPOCHS_MAX, math.ceil(_STEPS_MIN / steps))),
        batch_size=batch,
        learning_rate=learning_rate(spec, width),
        learning_rate_multiplier=spec.learning_rate_multiplier or 1.0,
        rank=rank,
        alpha=spec.alpha or ALPHA_RANKS * rank,
        checkpoint_steps=spec.checkpoint_steps or min(_CHECKPOINT_STEPS, steps),
    )
