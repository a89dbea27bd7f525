"""Trains a LoRA adapter: AdamW over the adapter alone, the frozen prefix computed once.

A step takes `batch_size` examples, in packs of about `pack_tokens` tokens one after the other: their gradients add up,
so memory is one pack's. Layers below the adapter's lowest compute the same in every epoch; PrefixCache keeps what they
give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgellm.errors import ConfigError
from edgellm.tune.batches import Batch, Examples
from edgellm.tune.decoder import Decoder
from edgellm.tune.lora import Lora
from edgellm.tune.loss import TokenLosses, token_losses
from edgellm.tune.objective import BETA, Score, log_likelihoods, preferences, supervised
from edgellm.tune.prefix_cache import PrefixCache
from edgellm.tune.schedule import learning_rate_at, step_examples

PACK_TOKENS = 2048
"""Of a pack, if memory allows."""

_CLIP = 1.0  # of the gradient's norm


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How long and how fast. Raises ConfigError for numbers that make no training."""

    epochs: int
    batch_size: int  # examples a step
    learning_rate: float  # at its height; it rises over the first steps and falls to a tenth by a cosine
    weight_decay: float = 0.0
    seed: int = 0
    pack_tokens: int = PACK_TOKENS
    beta: float = BETA  # of examples that are pairs

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.pack_tokens < 1:
            raise ConfigError("training needs at least one epoch and one example a step")
        for value in (self.learning_rate, self.beta):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"the learning rate and beta must be positive numbers, not {value}")


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step, or one look at validation examples: means over the answers' tokens, or over pairs."""

    step: int  # from 1
    loss: float
    accuracy: float  # the likeliest token was the right one, or the preferred answer was preferred
    trained_tokens: int
    all_tokens: int
    learning_rate: float = 0.0
    margin: float = 0.0  # of the rewards of pairs


class _Sums:
    """Scores added up."""

    def __init__(self) -> None:
        self.loss = self.right = self.margin = 0.0
        self.weight = self.trained = self.all = 0

    def add(self, score: Score, batch: Batch) -> None:
        self.loss += float(score.loss.detach())
        self.right += score.right
        self.margin += score.margin
        self.weight += score.weight
        self.trained += len(batch.targets)
        self.all += batch.tokens

    def metrics(self, step: int, rate: float) -> StepMetrics:
        of = max(1, self.weight)
        return StepMetrics(step, self.loss / of, self.right / of, self.trained, self.all, rate, self.margin / of)


class _Part:
    """Examples, and what is known of their sequences."""

    def __init__(self, examples: Examples, first: int) -> None:
        self.examples = examples
        self.first = first  # the number of its first sequence in the cache
        # log p of each answer under the base model; not a number until it is computed
        self.references = torch.full((len(examples.sequences),), torch.nan)


class Trainer:
    """One adapter in training. `steps` may be left and gone on with; `state` and `restore` go on after a restart."""

    def __init__(
        self,
        decoder: Decoder,
        lora: Lora,
        examples: Examples,
        plan: TrainingPlan,
        *,
        validation: Examples | None = None,
        cache: PrefixCache | None = None,
    ) -> None:
        """`cache` is for the sequences of `examples`, then those of `validation`. Raises ConfigError for examples with
        nothing to learn."""
        for some in (examples, *([validation] if validation else [])):
            if not len(some) or not any(sequence.trained_tokens for sequence in some.sequences):
                raise ConfigError("the examples have no answer to predict")
        self.decoder, self.lora, self.plan = decoder, lora, plan
        self._training = _Part(examples, 0)
        self._validation = None if validation is None else _Part(validation, len(examples.sequences))
        self._cache = cache
        self._optimiser = torch.optim.AdamW(
            list(lora.parameters()),
            lr=plan.learning_rate,
            weight_decay=plan.weight_decay,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.done = 0  # steps

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._training.examples) // self.plan.batch_size)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.plan.epochs

    def steps(self) -> Iterator[StepMetrics]:
        """Trains the steps that are left, one at each turn."""
        while self.done < self.total_steps:
            yield self._step(self._examples_of_step(self.done))

    def validate(self) -> StepMetrics | None:
        """The loss on the validation examples; nothing is learnt. None if there are none."""
        if self._validation is None:
            return None
        sums = _Sums()
        with torch.no_grad():
            for batch, score in self._scores(self._validation, range(len(self._validation.examples))):
                sums.add(score, batch)
        return sums.metrics(self.done, 0.0)

    def state(self) -> dict[str, Any]:
        """What `restore` takes, for torch.save."""
        pairs = {site.name: (a.detach().clone(), b.detach().clone()) for site, (a, b) in self.lora.pairs.items()}
        return {
            "done": self.done,
            "pairs": pairs,
            "optimiser": self._optimiser.state_dict(),
            "references": [part.references.clone() for part in (self._training, self._validation) if part],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave, of the same plan, examples and adapter. Raises ConfigError for another's."""
        pairs = state["pairs"]
        if not isinstance(pairs, dict) or set(pairs) != {site.name for site in self.lora.pairs}:
            raise ConfigError("the checkpoint is of another adapter")
        with torch.no_grad():
            for site, pair in self.lora.pairs.items():
                for mine, saved in zip(pair, pairs[site.name], strict=True):
                    mine.copy_(saved)
            parts = [part for part in (self._training, self._validation) if part]
            for part, saved in zip(parts, state["references"], strict=True):
                part.references.copy_(saved)
        self._optimiser.load_state_dict(state["optimiser"])
        self.done = int(state["done"])

    def _examples_of_step(self, step: int) -> Sequence[int]:
        count, plan = len(self._training.examples), self.plan
        return step_examples(step, count=count, batch_size=plan.batch_size, seed=plan.seed)

    def _step(self, numbers: Sequence[int]) -> StepMetrics:
        rate = learning_rate_at(self.done, steps=self.total_steps, height=self.plan.learning_rate)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        sums = _Sums()
        for batch, score in self._scores(self._training, numbers):
            if score.weight and score.loss.requires_grad:
                score.loss.backward()
            sums.add(score, batch)
        for tensor in self.lora.parameters():
            if tensor.grad is not None:
                tensor.grad.div_(max(1, sums.weight))
        torch.nn.utils.clip_grad_norm_(list(self.lora.parameters()), _CLIP)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.done += 1
        return sums.metrics(self.done, rate)

    def _scores(self, part: _Part, numbers: Sequence[int]) -> Iterator[tuple[Batch, Score]]:
        """Pack by pack. Go through it once: a pack's graph lives until the next one is asked for."""
        for members in part.examples.packs(numbers, self.plan.pack_tokens):
            batch = part.examples.batch(members)
            stream = self._stream(part, members, batch)
            found = self._losses(stream, batch, self.lora)
            if part.examples.width == 1:
                yield batch, supervised(found)
            else:
                yield batch, preferences(found, batch, self._reference(part, members, stream, batch), self.plan.beta)

    def _stream(self, part: _Part, members: Sequence[int], batch: Batch) -> Tensor:
        """What the adapter's lowest layer takes, (tokens, width), float32."""
        cache = self._cache
        if cache is None:
            return self.decoder.prefix(batch.packed, self.lora.lowest_layer)
        rows = [batch.packed.rows(number) for number in range(len(members))]
        kept = [cache.get(part.first + member) for member in members]
        if any(stream is None for stream in kept):
            made = self.decoder.prefix(batch.packed, self.lora.lowest_layer)
            kept = [cache.put(part.first + member, made[mine]) for member, mine in zip(members, rows, strict=True)]
        stream = torch.empty(len(batch.packed.tokens), self.decoder.shape.width)
        for mine, one in zip(rows, kept, strict=True):
            stream[mine] = one
        return stream

    def _losses(self, stream: Tensor, batch: Batch, lora: Lora | None) -> TokenLosses:
        layers = range(self.lora.lowest_layer, self.decoder.shape.layers)
        stream = self.decoder.layers(stream, batch.packed, layers, lora)
        return token_losses(self.decoder.normalise(stream[batch.places]), self.decoder.head, batch.targets)

    def _reference(self, part: _Part, members: Sequence[int], stream: Tensor, batch: Batch) -> Tensor:
        """log p of each answer under the base model alone, (sequences,); computed once."""
        which = torch.tensor(members)
        if part.references[which].isnan().any():
            with torch.no_grad():
                losses = self._losses(stream, batch, None).losses
                part.references[which] = log_likelihoods(losses, batch)
        return part.references[which]
