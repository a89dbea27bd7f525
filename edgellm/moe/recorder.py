"""A model's routes over a text, and how much of them look-ahead foresees: what `edgellm moe predict` measures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.errors import ModelUnsupportedError
from edgellm.moe.layout import ExpertLayout
from edgellm.moe.pager import load_paged
from edgellm.moe.predictors import Recall
from edgellm.moe.routes import DECODE, Shape, Step, Trace

_ROWS = 64  # of a step
_CHOSEN = -1  # the router's choice, where a record's distance would be


@dataclass(frozen=True, slots=True)
class Recording:
    """`foreseen[distance]` is the recall of the router so many layers ahead; 0, its own layer's, is the control.

    NaN for the layers that nothing lies before.
    """

    trace: Trace
    foreseen: dict[int, Recall]


def record_routes(
    layout: ExpertLayout, text: str, tokens: int, home: Path, *, budget_bytes: int, threads: int, architecture: str
) -> Recording:
    """Reads the first `tokens` tokens of `text`. Raises ModelUnsupportedError and what `load_paged` raises."""
    if not layout.experts_used:
        raise ModelUnsupportedError(f"{layout.name} does not say how many experts a token uses")
    model = load_paged(layout, budget_bytes, home)
    counter = _Counter(layout.layers)
    with contextlib.closing(model):
        ids = model.vocab.tokenize(text, add_special=False, parse_special=False)[:tokens]
        steps = _steps(model, ids, counter, threads)
    name = "".join(layout.headers[0].path.stem.split())
    shape = Shape(name, architecture, layout.layers, layout.experts, layout.experts_used, layout.read_bytes)
    return Recording(Trace(shape, tuple(steps)), counter.recalls())


def _steps(model: Model, ids: Sequence[int], counter: _Counter, threads: int) -> list[Step]:
    """The steps of reading `ids`, which `counter` has looked at."""
    store = model.experts
    if store is None:
        raise ModelUnsupportedError(f"{model.path.name} is not paged")
    params = ContextParams(len(ids) + 1, sequences=1, batch_tokens=_ROWS, outputs=_ROWS, threads=threads)
    steps, batch = list[Step](), Batch(_ROWS)
    with contextlib.closing(Context(model, params)) as context:
        store.log_routes(True)
        for start in range(0, len(ids), _ROWS):
            rows = ids[start : start + _ROWS]
            batch.clear()
            batch.extend(rows, start, 0, outputs=len(rows))  # without output, llama.cpp leaves them out at the end
            context.decode(batch)
            steps += counter.take(store.take_log(), start)
    return steps


def steps_in(log: npt.NDArray[np.int32], layers: int) -> list[Step]:
    """The routers' choices in the log of one or more steps of any width, one Step a token."""
    return _Counter(layers).take(log, 0)


class _Counter:
    """Takes logs apart (`ExpertStore.take_log`), and counts what was foreseen."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._right: dict[int, list[int]] = {}
        self._asked: dict[int, list[int]] = {}

    def take(self, log: npt.NDArray[np.int32], position: int) -> list[Step]:
        """The log of whole steps; the tokens of the first stand at `position` and after."""
        steps: list[Step] = []
        rows: dict[int, dict[int, tuple[int, ...]]] = {}
        guesses: dict[tuple[int, int, int], tuple[int, ...]] = {}
        for distance, layer, token, experts in _records(log):
            if distance != _CHOSEN:
                guesses[distance, layer, token] = experts
                if distance == 0:
                    self._count(0, layer, experts, rows[token][layer])
                continue
            if layer in rows.get(token, {}):  # the next step has begun
                steps += self._close(rows, position + len(steps))
                guesses.clear()
            rows.setdefault(token, {})[layer] = experts
            for ahead in (1, 2):
                if (guess := guesses.get((ahead, layer, token))) is not None:
                    self._count(ahead, layer, guess, experts)
        return steps + self._close(rows, position + len(steps))

    def _close(self, rows: dict[int, dict[int, tuple[int, ...]]], position: int) -> list[Step]:
        found = [
            Step(0, DECODE, position + number, tuple(rows[token].get(layer, ()) for layer in range(self._layers)))
            for number, token in enumerate(sorted(rows))
        ]
        rows.clear()
        return found

    def _count(self, distance: int, layer: int, guess: Sequence[int], chosen: Sequence[int]) -> None:
        self._right.setdefault(distance, [0] * self._layers)[layer] += len(set(guess) & set(chosen))
        self._asked.setdefault(distance, [0] * self._layers)[layer] += len(chosen)

    def recalls(self) -> dict[int, Recall]:
        return {
            distance: Recall(
                sum(self._right[distance]) / max(1, sum(asked)),
                tuple(right / n if n else math.nan for right, n in zip(self._right[distance], asked, strict=True)),
            )
            for distance, asked in sorted(self._asked.items())
        }


def _records(log: npt.NDArray[np.int32]) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """(distance, layer, token, experts) of each record."""
    numbers, at = log.tolist(), 0
    while at < len(numbers):
        distance, layer, token, count = numbers[at : at + 4]
        yield distance, layer, token, tuple(numbers[at + 4 : at + 4 + count])
        at += 4 + count
