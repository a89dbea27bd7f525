"""Predictors of a layer's experts that need no hidden states, and how good they are on traces.

Each is asked before a layer runs, and told afterwards what the layer used. A predictor that sees the hidden states is
better (the next layer's router, applied one layer early: 81 to 89 % of the experts); these cost next to nothing, and
can be asked at any time.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgellm.errors import InvalidTraceError
from edgellm.models.files import write_atomic
from edgellm.moe.routes import DECODE, Trace

_FORMAT = "edgellm experts 1"
_MOST_COUNT = 1 << 20
_MOST_FILE_BYTES = 1 << 28  # of a table, unpacked


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
            counts[expert] = min(counts[expert] + 1, _MOST_COUNT)


class PairTable:
    """EdgeMoE's table (arXiv 2308.14352, section 3.3), learned while serving instead of offline.

    Key: the experts active in the two previous layers. Value: how often each expert of the layer followed. With 128
    experts most keys are met for the first time, so the evidence is backed up: an unseen key falls back to the sum over
    the experts active in the previous layer of how often each of the layer's experts followed each of them, then to the
    layer's own frequencies. A layer keeps at most `keys` keys and forgets the one not met for longest. The first two
    layers of a token have no two before them: they take what the last layers of the token before used.
    """

    def __init__(self, layers: int, experts: int, *, keys: int = 4096) -> None:
        if layers < 1 or experts < 1 or keys < 1:
            raise ValueError("there must be a layer, an expert and room for a key")
        self.layers, self.experts, self.keys = layers, experts, keys
        self._exact: list[OrderedDict[tuple[int, ...], dict[int, int]]] = [OrderedDict() for _ in range(layers)]
        self._after: list[dict[int, dict[int, int]]] = [{} for _ in range(layers)]  # of one expert of the layer before
        self._hot = HotList(layers, experts)
        self._before: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # the two previous layers' experts

    def predict(self, layer: int, count: int) -> list[int]:
        """The most probable by the exact key, then, for what that leaves open, by single experts, then by frequency."""
        exact = self._exact[layer].get(self._key(), {})
        single = [0.0] * self.experts
        for expert in self._before[1]:
            followed = self._after[layer].get(expert, {})
            total = sum(followed.values())
            for other, times in followed.items():
                single[other] += times / total
        hot = self._hot.predict(layer, self.experts)
        place = {expert: index for index, expert in enumerate(hot)}
        return sorted(range(self.experts), key=lambda e: (-exact.get(e, 0), -single[e], place[e]))[:count]

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._learn(layer, self._key(), experts)
        for before in self._before[1]:
            followed = self._after[layer].setdefault(before, {})
            for expert in experts:
                followed[expert] = min(followed.get(expert, 0) + 1, _MOST_COUNT)
        self._hot.observe(layer, experts)
        self._before = (self._before[1], tuple(sorted(experts)))

    def save(self, path: Path) -> None:
        """Write what was learned to `path`, whole or not at all. Raises OSError."""
        content = {
            "format": _FORMAT,
            "layers": self.layers,
            "experts": self.experts,
            "hot": self._hot.counts,
            "after": [[[key, _pairs(value)] for key, value in table.items()] for table in self._after],
            "exact": [[[key, _pairs(value)] for key, value in table.items()] for table in self._exact],
        }
        write_atomic(path, gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0))

    @classmethod
    def load(cls, path: Path, layers: int, experts: int, *, keys: int = 4096) -> PairTable:
        """What `save` wrote for a model of this shape. Raises InvalidTraceError, and OSError if it cannot be opened."""
        try:
            with gzip.open(path) as file:
                raw = file.read(_MOST_FILE_BYTES + 1)
            content = json.loads(raw) if len(raw) <= _MOST_FILE_BYTES else None
            table = cls(layers, experts, keys=keys)
            table._restore(content)
        except (gzip.BadGzipFile, zlib.error, EOFError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidTraceError(f"{path.name} is not a table of experts for this model") from error
        return table

    def _restore(self, content: Any) -> None:
        """Raises ValueError, TypeError or KeyError."""
        if (content["format"], content["layers"], content["experts"]) != (_FORMAT, self.layers, self.experts):
            raise ValueError("another format or shape")
        if any(len(content[part]) != self.layers for part in ("hot", "after", "exact")):
            raise ValueError("another number of layers")
        for layer in range(self.layers):
            hot = [_checked(count, _MOST_COUNT) for count in content["hot"][layer]]
            if len(hot) != self.experts:
                raise ValueError("another number of experts")
            self._hot.counts[layer] = hot
            for key, pairs in content["after"][layer]:
                self._after[layer][_checked(key, self.experts - 1)] = self._counts(pairs)
            for key, pairs in content["exact"][layer][-self.keys :]:
                known = tuple(_checked(expert + 1, self.experts) - 1 for expert in key)
                self._exact[layer][known] = self._counts(pairs)

    def _counts(self, pairs: Any) -> dict[int, int]:
        return {_checked(expert, self.experts - 1): _checked(count, _MOST_COUNT, 1) for expert, count in pairs}

    def _key(self) -> tuple[int, ...]:
        first, second = self._before
        return (*first, -1, *second)

    def _learn(self, layer: int, key: tuple[int, ...], experts: Sequence[int]) -> None:
        table = self._exact[layer]
        counts = table.setdefault(key, {})
        table.move_to_end(key)
        for expert in experts:
            counts[expert] = min(counts.get(expert, 0) + 1, _MOST_COUNT)
        if len(table) > self.keys:
            table.popitem(last=False)


def _largest(values: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def _pairs(counts: dict[int, int]) -> list[tuple[int, int]]:
    return list(counts.items())


def _checked(value: Any, most: int, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is not from {least} to {most}")
    return value
