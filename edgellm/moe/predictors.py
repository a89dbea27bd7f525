"""Predictors of a layer's experts that need no hidden states, and how good they are on traces.

Each is asked before a layer runs, and told afterwards what the layer used. A predictor that sees the hidden states is
better (the next layer's router, applied one layer early: 81 to 89 % of the experts); these cost next to nothing, and
can be asked at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgellm.moe.routes import DECODE, Trace


class Predictor(Protocol):
    """Foresees the experts of one layer after the other."""

    def predict(self, layer: int, count: int) -> list[int]:
        """The `count` experts that `layer` will most probably use next, the most probable first; perhaps fewer."""
        ...

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """`layer` used `experts`. Layers come in the order in which they run, one token after the other."""
        ...


@dataclass(frozen=True, slots=True)
class Recall:
    """How much of what the layers used had been predicted, with as many guesses as a layer uses experts; 0 to 1."""

    overall: float
    layers: tuple[float, ...]


def score(trace: Trace, predictor: Predictor) -> Recall:
    """Lead `predictor` through the whole trace, token after token, and count on the decoded ones."""
    right, uses = [0] * trace.shape.layers, [0] * trace.shape.layers
    for step in trace.steps:
        for layer, experts in enumerate(step.experts):
            if not experts:
                continue
            if isinstance(predictor, Told):
                predictor.tell(experts)
            if step.phase == DECODE:
                guess = predictor.predict(layer, len(experts))[: len(experts)]
                right[layer] += len(set(guess) & set(experts))
                uses[layer] += len(experts)
            predictor.observe(layer, experts)
    rates = tuple(r / max(1, n) for r, n in zip(right, uses, strict=True))
    return Recall(sum(right) / max(1, sum(uses)), rates)


class Told:
    """The router's own choice, a control: `score` must find a recall of 1."""

    def __init__(self) -> None:
        self._experts: tuple[int, ...] = ()

    def tell(self, experts: Sequence[int]) -> None:
        """What the router is about to choose."""
        self._experts = tuple(experts)

    def predict(self, _layer: int, count: int) -> list[int]:
        return list(self._experts[:count])

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """Nothing to learn."""


class PreviousToken:
    """What the layer used for the token before."""

    def __init__(self, layers: int) -> None:
        self._last: list[tuple[int, ...]] = [()] * layers

    def predict(self, layer: int, count: int) -> list[int]:
        return list(self._last[layer][:count])

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._last[layer] = tuple(experts)


class HotList:
    """What the layer used most often so far; of equal ones those of the lowest number."""

    def __init__(self, layers: int, experts: int) -> None:
        self.counts = [[0] * experts for _ in range(layers)]

    def predict(self, layer: int, count: int) -> list[int]:
        return _largest(self.counts[layer], count)

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        counts = self.counts[layer]
        for expert in experts:
            counts[expert] += 1


def _largest(values: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]
