"""Trains a small drafter on a target's answers (sequence-level distillation, arXiv 1606.07947)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from edgellm.tune.draft.net import Net
from edgellm.tune.draft.samples import Sample
from edgellm.tune.prefix_tree import Packed, pack

_CLIP = 1.0
_BETAS = (0.9, 0.95)
_WARM_UP = 0.05  # of the run
_LAST = 0.05  # of the learning rate, at the end
_LOOKS = 20  # at the held-out answers, over a run


@dataclass(frozen=True, slots=True)
class Course:
    """How long and how to train."""

    epochs: int = 10
    time_s: float = math.inf  # for all of it: less is trained if need be
    pack_tokens: int = 2048  # of a step
    learning_rate: float = 6e-4
    decay: float = 0.05
    softness: float = 0.0  # the part of the loss that what the target might have written has
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """The model at a time of the run, over the held-out answers' tokens."""

    step: int
    steps: int
    seconds: float
    train_loss: float  # since the last look; nan before the first step
    loss: float
    right: float  # share of tokens that are the likeliest


class Distiller:
    """A run. The best weights so far, those with most held-out tokens right, are the net's when `run` returns."""

    def __init__(self, net: Net, train: Sequence[Sample], held: Sequence[Sample], course: Course) -> None:
        """Without `held`, it is measured on what is trained."""
        self.net, self.course = net, course
        self._train, self._held = list(train), list(held or train)
        self.steps = course.epochs * len(self._packs(0))
        matrices = [one for one in net.parameters() if one.ndim == 2]
        others = [one for one in net.parameters() if one.ndim != 2]
        groups = [{"params": matrices, "weight_decay": course.decay}, {"params": others, "weight_decay": 0.0}]
        self._optimiser = torch.optim.AdamW(groups, lr=course.learning_rate, betas=_BETAS)
        self._losses: list[float] = []
        self._started = 0.0
        self.tokens = 0  # that were gone through

    def run(self, report: Callable[[Look], None], stopped: Callable[[], bool] = lambda: False) -> tuple[Look, Look]:
        """Trains until the end, the time is up, or `stopped` says so. How it was before, and the best."""
        self._started = time.monotonic()
        first = best = self.look(0)
        report(first)
        weights = self._copy()
        every, step, share = max(1, self.steps // _LOOKS), 0, 0.0
        for chosen in self._steps():
            share = max(step / self.steps, (time.monotonic() - self._started) / self.course.time_s)
            if share >= 1 or stopped():
                break
            self._step(chosen, share)
            step += 1
            if step % every == 0 and step < self.steps:
                best, weights = self._judge(step, best, weights, report)
        if self._losses:
            best, weights = self._judge(step, best, weights, report)
        with torch.no_grad():
            for mine, kept in zip(self.net.parameters(), weights, strict=True):
                mine.copy_(kept)
        return first, best

    def look(self, step: int) -> Look:
        """Nothing is learned."""
        loss = right = 0.0
        count = 0
        with torch.no_grad():
            for chosen in self._in_packs(self._held, range(len(self._held))):
                packed, places, targets = _lay_out(chosen)
                logits = self.net.logits(packed, places)
                loss += float(F.cross_entropy(logits, targets, reduction="sum"))
                right += float((logits.argmax(1) == targets).sum())
                count += len(targets)
        trained = sum(self._losses) / len(self._losses) if self._losses else math.nan
        self._losses.clear()
        return Look(step, self.steps, time.monotonic() - self._started, trained, loss / count, right / count)

    def _judge(
        self, step: int, best: Look, weights: list[Tensor], report: Callable[[Look], None]
    ) -> tuple[Look, list[Tensor]]:
        look = self.look(step)
        report(look)
        better = (look.right, -look.loss) > (best.right, -best.loss)
        return (look, self._copy()) if better else (best, weights)

    def _copy(self) -> list[Tensor]:
        return [one.detach().clone() for one in self.net.parameters()]

    def _steps(self) -> Iterator[list[Sample]]:
        for epoch in range(self.course.epochs):
            yield from self._packs(epoch)

    def _packs(self, epoch: int) -> list[list[Sample]]:
        order = np.random.default_rng((self.course.seed, epoch)).permutation(len(self._train))
        return self._in_packs(self._train, order)

    def _in_packs(
        self, samples: Sequence[Sample], order: Sequence[int] | np.typing.NDArray[np.int64]
    ) -> list[list[Sample]]:
        """In this order, as many in a pack as fit; at least one."""
        packs: list[list[Sample]] = []
        room = 0
        for number in order:
            sample = samples[int(number)]
            if len(sample.tokens) > room or not packs:
                packs.append([])
                room = self.course.pack_tokens
            packs[-1].append(sample)
            room -= len(sample.tokens)
        return packs

    def _step(self, chosen: list[Sample], share: float) -> None:
        """`share` of the run is behind."""
        rate = self.course.learning_rate * _height(share, 1 / self.steps)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        packed, places, targets = _lay_out(chosen)
        guesses = self.net.logits(packed, places).log_softmax(1)
        losses = F.nll_loss(guesses, targets, reduction="none")
        if self.course.softness:
            losses = _softened(losses, guesses, chosen, self.course.softness)
        loss = losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), _CLIP)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._losses.append(float(loss.detach()))
        self.tokens += len(packed.tokens)


def _height(share: float, step: float) -> float:
    """Of the learning rate, when `share` of the run is behind: it rises, then falls by a cosine. `step`: a step's."""
    if share < _WARM_UP:
        return min(1.0, (share + step) / _WARM_UP)
    part = (share - _WARM_UP) / (1 - _WARM_UP)
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * part)) / 2


def _softened(losses: Tensor, guesses: Tensor, chosen: Sequence[Sample], softness: float) -> Tensor:
    """`losses`, (places,), with those mixed in of the places whose token might have been another.

    guesses: log p, (places, vocabulary).
    """
    rows: list[int] = []
    places, tokens, shares = [], [], []
    first = 0
    for sample in chosen:
        if sample.soft is not None:
            for place, others, parts in zip(sample.soft.places, sample.soft.tokens, sample.soft.shares, strict=True):
                row = first + place - sample.start
                rows.append(row)
                places += [row] * len(others)
                tokens += others
                shares += parts
        first += len(sample.tokens) - sample.start
    if not rows:
        return losses
    where = torch.tensor(places)
    soft = torch.zeros_like(losses).index_add(0, where, -torch.tensor(shares) * guesses[where, torch.tensor(tokens)])
    mixed = torch.zeros_like(losses).index_fill(0, torch.tensor(rows), softness)
    return losses + mixed * (soft - losses)


def _lay_out(chosen: Sequence[Sample]) -> tuple[Packed, Tensor, Tensor]:
    """A pack, the places in it whose next token is one of an answer, and those tokens."""
    packed = pack([sample.tokens for sample in chosen])
    places = [packed.rows(number)[sample.start - 1 : -1] for number, sample in enumerate(chosen)]
    targets = [torch.tensor(sample.tokens[sample.start :]) for sample in chosen]
    return packed, torch.cat(places), torch.cat(targets)
