"""What each step of a run trains on, and how fast; also for those who compare with it (scripts/bench_tune)."""

from __future__ import annotations

import math

import numpy as np

_WARMUP_SHARE = 0.05  # of the steps
_LAST_SHARE = 0.1  # of the learning rate, at the end


def step_examples(step: int, *, count: int, batch_size: int, seed: int) -> list[int]:
    """The examples, of `count`, that step `step`, from 0, takes: each epoch goes through all of them in a new order."""
    epoch, index = divmod(step, -(-count // batch_size))
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return [int(number) for number in order[index * batch_size : (index + 1) * batch_size]]


def learning_rate_at(step: int, *, steps: int, height: float) -> float:
    """The learning rate of step `step`, from 0, of `steps`: it rises to `height` over the first twentieth of them and
    falls to a tenth of it by a cosine."""
    warmup = max(1, round(_WARMUP_SHARE * steps))
    if step < warmup:
        return height * (step + 1) / warmup
    part = (step - warmup) / max(1, steps - warmup)
    return height * (_LAST_SHARE + (1 - _LAST_SHARE) * (1 + math.cos(math.pi * part)) / 2)
