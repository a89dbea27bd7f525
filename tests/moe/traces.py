"""Routing traces for the tests: made up with skew and locality, and real ones from the folder EDGELLM_ROUTES."""

from __future__ import annotations

import os
import random
from pathlib import Path

from edgellm.moe.routes import DECODE, PROMPT, Shape, Step, Trace, read_trace


def made_up(
    seed: int,
    *,
    layers: int = 6,
    experts: int = 32,
    top_k: int = 4,
    prompt: int = 12,
    decoded: int = 60,
    stay: float = 0.35,
) -> Trace:
    """Each layer has its own hot experts (Zipf), and a chosen expert stays for the next token with probability `stay`.

    Half of the topic, which experts are hot, changes every twenty tokens.
    """
    draw = random.Random(seed)
    orders = [draw.sample(range(experts), experts) for _ in range(layers)]
    weights = [1.0 / (rank + 1) ** 0.8 for rank in range(experts)]
    last: list[list[int]] = [[] for _ in range(layers)]
    steps = []
    for position in range(prompt + decoded):
        if position % 20 == 19:
            for order in orders:
                half = order[::2]
                draw.shuffle(half)
                order[::2] = half
        for layer in range(layers):
            chosen = [expert for expert in last[layer] if draw.random() < stay]
            while len(chosen) < top_k:
                (expert,) = draw.choices(orders[layer], weights)
                if expert not in chosen:
                    chosen.append(expert)
            last[layer] = chosen
        steps.append(Step(0, PROMPT if position < prompt else DECODE, position, tuple(map(tuple, last))))
    sizes = tuple(1000 + 500 * (layer % 2) for layer in range(layers))
    return Trace(Shape("made-up.gguf", "none", layers, experts, top_k, sizes), tuple(steps))


def real_traces() -> list[Path]:
    """The traces in the folder that EDGELLM_ROUTES names; none if it is not set."""
    folder = os.environ.get("EDGELLM_ROUTES")
    return sorted(Path(folder).glob("*.csv.gz")) if folder else []


def all_traces() -> list[Trace]:
    """A few made-up traces of different shapes, and the real ones."""
    some = [made_up(1), made_up(2, layers=9, experts=16, top_k=2), made_up(3, layers=4, experts=64, top_k=8, stay=0.6)]
    return some + [read_trace(path) for path in real_traces()]
