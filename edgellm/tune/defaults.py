"""What "auto" comes to: the trainer's own choices, measured on SmolLM2 and Qwen (docs/tuning.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgellm.tune.spec import RunSpec

RANK = 16
LEARNING_RATE = 1e-3
"""For a multiplier of 1."""

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


def decide(spec: RunSpec, examples: int) -> Hyperparameters:
    """What the spec says, and the trainer's choice for the rest."""
    batch = spec.batch_size or max(1, min(_BATCH_MAX, examples // 16))
    batch = min(batch, examples)
    steps = -(-examples // batch)
    multiplier = spec.learning_rate_multiplier or 1.0
    rank = spec.rank or RANK
    return Hyperparameters(
        epochs=spec.epochs or max(_EPOCHS, min(_EPOCHS_MAX, math.ceil(_STEPS_MIN / steps))),
        batch_size=batch,
        learning_rate=LEARNING_RATE * multiplier,
        learning_rate_multiplier=multiplier,
        rank=rank,
        alpha=spec.alpha or 2.0 * rank,
        checkpoint_steps=spec.checkpoint_steps or min(_CHECKPOINT_STEPS, steps),
    )
