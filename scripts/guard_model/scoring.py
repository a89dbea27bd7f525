"""What a guard says of labelled prompts, row by row: the whole way through `guards`, disguises and windows included."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from guard_model.data import Prompt
from guards import Guard


@dataclass(frozen=True, slots=True)
class Scored:
    """A prompt's label and log-odds; `set` is its set of the split, `fold` the fold whose classifier never saw it."""

    fold: str
    set: str
    id: str
    source: str
    lang: str
    kind: str
    unsafe: bool
    log_odds: float
    jailbreak: float
    milliseconds: float
    foreign: bool = False  # the window that decided
    agreed: bool = True  # as of its Prompt
    early: float = 0.0  # log-odds of that window by the first layers
    named: list[str] = field(default_factory=list)  # the categories that its source names
    categories: dict[str, float] = field(default_factory=dict)  # log-odds of each, if it is unsafe at all


def scored(guard: Guard, fold: str, name: str, prompts: Sequence[Prompt]) -> list[Scored]:
    """Every prompt judged by itself."""
    found = []
    for prompt in prompts:
        verdict = guard.check(prompt.text)
        found.append(
            Scored(
                fold,
                name,
                prompt.id,
                prompt.source,
                prompt.lang,
                prompt.kind,
                prompt.unsafe,
                log_odds(verdict.score),
                log_odds(verdict.jailbreak_score),
                verdict.milliseconds,
                verdict.window is not None and verdict.window.foreign,
                prompt.agreed,
                log_odds(verdict.window.early_score) if verdict.window else -30.0,
                sorted(prompt.categories),
                {key: log_odds(value / verdict.score) for key, value in verdict.categories.items()},
            )
        )
    return found


def log_odds(probability: float) -> float:
    """The inverse of the logistic function, finite at 0 and 1."""
    p = min(max(probability, 1e-12), 1 - 1e-12)
    return math.log(p / (1 - p))


def write(file: Path, rows: Iterable[Scored]) -> None:
    """One JSON object a line; written beside and moved, so that a file that is there is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    with beside.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
    beside.replace(file)


def read(file: Path) -> list[Scored]:
    """What `write` wrote."""
    with file.open(encoding="utf-8") as lines:
        return [Scored(**json.loads(line)) for line in lines]
