"""Trains a LoRA adapter on packed rows: AdamW over the adapter alone, the frozen prefix computed once.

Layers below the adapter's lowest compute the same in every epoch. What they give, the residual stream that layer
takes, is kept on disk after the first epoch (`PrefixCache`), so that later epochs begin there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm.errors import ConfigError
from edgellm.tune.decoder import Decoder, Packed
from edgellm.tune.lora import Lora
from edgellm.tune.loss import token_losses
from edgellm.tune.packing import PackedRows

_CLIP = 1.0  # of the gradient's norm
_WARMUP_SHARE = 0.05  # of the steps


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How long and how fast. Raises ConfigError for numbers that make no training."""

    epochs: int
    rows_per_step: int
    learning_rate: float  # at its height; it rises over the first steps and falls to a tenth by a cosine
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.rows_per_step < 1:
            raise ConfigError("training needs at least one epoch and one row a step")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"the learning rate must be a positive number, not {self.learning_rate}")


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step, or one look at validation rows: means over the answers' tokens."""

    step: int  # from 1
    loss: float
    accuracy: float  # the likeliest token was the right one
    trained_tokens: int
    learning_rate: float


class PrefixCache:
    """The frozen prefix's output for each row, in one file: (rows, row_tokens, width), float32 or bfloat16.

    It is made from the user's text: the file is private, and goes with `close`. Without a file nothing is kept.
    """

    def __init__(self, path: Path | None, rows: int, row_tokens: int, width: int, dtype: torch.dtype) -> None:
        """Raises OSError, also where there is no room for all of it: a disk that fills later would end the process."""
        self._there = np.zeros(rows, bool)
        self._dtype = dtype
        self._path = path
        self._data: np.memmap[tuple[int, int, int], np.dtype[np.int16]] | None = None
        if path is not None:
            shape = (rows, row_tokens, width * (2 if dtype == torch.float32 else 1))  # of 16 bits
            with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
            self._data = np.memmap(path, np.int16, "r+", shape=shape)

    def get(self, row: int, tokens: int) -> Tensor | None:
        """What was put, (tokens, width), float32; None if nothing was."""
        if self._data is None or not self._there[row]:
            return None
        return torch.from_numpy(np.array(self._data[row, :tokens])).view(self._dtype).float()

    def put(self, row: int, stream: Tensor) -> Tensor:
        """`stream`: (tokens, width), float32; and what `get` will give of it, so that all epochs see the same."""
        if self._data is None:
            return stream
        kept = stream.to(self._dtype)
        self._data[row, : len(stream)] = kept.view(torch.int16).numpy()
        self._there[row] = True
        return kept.float()

    def close(self) -> None:
        """Deletes the file. Idempotent."""
        self._data = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def row_of(rows: PackedRows, number: int) -> tuple[Packed, Tensor, Tensor]:
    """Row `number` without its padding, the places whose next token is learnt, (n,), and those tokens, (n,)."""
    segments = rows.segments[number]
    used = int((segments > 0).sum())
    tokens = torch.from_numpy(rows.tokens[number, :used].astype(np.int64))
    lengths = tuple(np.bincount(segments[:used])[1:].tolist())
    learnt = torch.from_numpy(np.flatnonzero(rows.mask[number, :used]))
    return Packed(tokens, lengths), learnt - 1, tokens[learnt]


class Trainer:
    """One adapter in training. `steps` may be left and gone on with; `state` and `restore` go on after a restart."""

    def __init__(
        self, decoder: Decoder, lora: Lora, rows: PackedRows, plan: TrainingPlan, *, cache: PrefixCache | None = None
    ) -> None:
        self.decoder, self.lora, self.rows, self.plan = decoder, lora, rows, plan
        shape = (len(rows.tokens), rows.tokens.shape[1], decoder.shape.width)
        self._cache = cache or PrefixCache(None, *shape, decoder.dtype)
        self._optimiser = torch.optim.AdamW(
            list(lora.parameters()), lr=plan.learning_rate, weight_decay=plan.weight_decay, betas=(0.9, 0.99)
        )
        self.done = 0  # steps

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows.tokens) // self.plan.rows_per_step)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.plan.epochs

    def steps(self) -> Iterator[StepMetrics]:
        """Trains the steps that are left, one at each turn."""
        while self.done < self.total_steps:
            yield self._step(self._rows_of_step(self.done))

    def validate(self, rows: PackedRows) -> StepMetrics:
        """The loss on other rows; nothing is learnt. Raises ConfigError if they have nothing to predict."""
        losses, correct = [], []
        with torch.no_grad():
            for number in range(len(rows.tokens)):
                packed, places, targets = row_of(rows, number)
                hidden = self.decoder.normalise(self.decoder.hidden(packed, self.lora)[places])
                found = token_losses(hidden, self.decoder.head, targets)
                losses.append(found.losses)
                correct.append(found.correct)
        every = torch.cat(losses) if losses else torch.empty(0)
        if not len(every):
            raise ConfigError("the validation rows have no answer to predict")
        right = float(torch.cat(correct).float().mean())
        return StepMetrics(self.done, float(every.mean()), right, len(every), 0.0)

    def state(self) -> dict[str, Any]:
        """What `restore` takes, for torch.save."""
        pairs = {site.name: (a.detach().clone(), b.detach().clone()) for site, (a, b) in self.lora.pairs.items()}
        return {"done": self.done, "pairs": pairs, "optimiser": self._optimiser.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave, of the same plan, rows and adapter. Raises ConfigError for another's."""
        pairs = state["pairs"]
        if not isinstance(pairs, dict) or set(pairs) != {site.name for site in self.lora.pairs}:
            raise ConfigError("the checkpoint is of another adapter")
        with torch.no_grad():
            for site, pair in self.lora.pairs.items():
                for mine, saved in zip(pair, pairs[site.name], strict=True):
                    mine.copy_(saved)
        self._optimiser.load_state_dict(state["optimiser"])
        self.done = int(state["done"])

    def _rows_of_step(self, step: int) -> Sequence[int]:
        epoch, index = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.plan.seed, epoch)).permutation(len(self.rows.tokens))
        first = index * self.plan.rows_per_step
        return [int(row) for row in order[first : first + self.plan.rows_per_step]]

    def _step(self, numbers: Sequence[int]) -> StepMetrics:
        rate = self._rate(self.done)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        rows = [row_of(self.rows, number) for number in numbers]
        count = sum(len(targets) for _, _, targets in rows)
        total, right = 0.0, 0
        for number, (packed, places, targets) in zip(numbers, rows, strict=True):
            stream = self._cache.get(number, len(packed.tokens))
            if stream is None:
                stream = self._cache.put(number, self.decoder.prefix(packed, self.lora.lowest_layer))
            if not len(targets):
                continue
            hidden = self.decoder.normalise(self.decoder.suffix(stream, packed, self.lora)[places])
            found = token_losses(hidden, self.decoder.head, targets)
            (found.losses.sum() / max(1, count)).backward()
            total += float(found.losses.detach().sum())
            right += int(found.correct.sum())
        torch.nn.utils.clip_grad_norm_(list(self.lora.parameters()), _CLIP)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.done += 1
        return StepMetrics(self.done, total / max(1, count), right / max(1, count), count, rate)

    def _rate(self, step: int) -> float:
        warmup = max(1, round(_WARMUP_SHARE * self.total_steps))
        if step < warmup:
            return self.plan.learning_rate * (step + 1) / warmup
        part = (step - warmup) / max(1, self.total_steps - warmup)
        return self.plan.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2)
