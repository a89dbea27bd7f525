"""How long a verdict takes, on one core: prompts of a length made of real text, none of them seen before."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from guards import Guard
from guards.card import Passing
from guards.classifier import Classifier
from guards.guard import MODEL


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of a verdict."""

    tokens: int
    layers: str  # "as needed", or "all": what a prompt costs in which no window passes early
    prompts: int
    p50_ms: float
    p95_ms: float


def cut(texts: Iterable[str], tokens: int, classifier: Classifier) -> Iterator[str]:
    """Pieces of the texts joined, each of `tokens` tokens by the classifier's own count (two of them its frame's)."""
    words: list[str] = []
    for text in texts:
        words += text.split()
        while len(words) > tokens:
            low, high = 1, tokens
            while low < high:  # the most words that fit
                middle = (low + high + 1) // 2
                if classifier.count(" ".join(words[:middle])) + 2 <= tokens:
                    low = middle
                else:
                    high = middle - 1
            yield " ".join(words[:low])
            del words[:low]


def measure(texts: Sequence[str], tokens: int, most: int, *, everything: bool = False) -> Latency:
    """Of `most` prompts, after ten to warm up. `everything`: no window passes early, every sentence is judged. The
    process stays on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    guard = Guard()
    if everything:
        nothing = Passing(-math.inf, -math.inf, -math.inf)
        guard._classifier.card = replace(guard._classifier.card, passing=nothing)
    spent = []
    for number, text in enumerate(cut(texts, tokens, Classifier(MODEL))):
        if number >= most + 10:
            break
        milliseconds = guard.check(text).milliseconds
        if number >= 10:
            spent.append(milliseconds)
    cuts = statistics.quantiles(spent, n=20)
    layers = "all" if everything else "as needed"
    return Latency(tokens, layers, len(spent), statistics.median(spent), cuts[-1])
