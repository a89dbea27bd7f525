"""A target's answers in a drafter's tokens, as the drafter reads them when it drafts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.errors import TrainingDataError
from edgellm.speculative.bridge import Bridge
from edgellm.speculative.drafter import CELLS, READ_TOKENS
from edgellm.speculative.transcript import Transcript

_MOST_FAULTS = 20


@dataclass(slots=True)
class Row:
    """A line of the data. What it lacks is made of what it has: tokens of messages, an answer by the target."""

    prompt: list[int] = field(default_factory=list)  # the target's tokens, as are the answer's
    answer: list[int] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Soft:
    """Places in a sample whose token might as well have been another: these tokens, with these shares."""

    places: list[int]
    tokens: list[list[int]]
    shares: list[list[float]]


@dataclass(frozen=True, slots=True)
class Sample:
    """Drafter tokens, and where the answer begins: what is before it is read, and not learned."""

    tokens: list[int]
    start: int  # at least 1
    soft: Soft | None = None


def read_rows(path: Path, vocabulary: int) -> list[Row]:
    """The lines of a JSON-lines file: {"prompt": [tokens], "answer": [tokens]} or {"messages": [...]}.

    Tokens are the target's, of `vocabulary`. Without an answer, or if the last message is not the assistant's, the
    target is to answer. Raises TrainingDataError with all that is wrong, by lines.
    """
    rows: list[Row] = []
    faults: list[tuple[int, str]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    rows.append(_row(json.loads(line), vocabulary))
                except ValueError as error:
                    faults.append((number, str(error)))
                except RecursionError:
                    faults.append((number, "is nested too deeply"))
                if len(faults) == _MOST_FAULTS:
                    break
    except (OSError, UnicodeDecodeError) as error:
        faults.append((0, f"cannot be read: {error}"))
    if not rows and not faults:
        faults.append((0, "has no lines"))
    if faults:
        raise TrainingDataError(faults, "data")
    return rows


def _row(found: object, vocabulary: int) -> Row:
    """Raises ValueError."""
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    kind = found.get("kind", "")
    if not isinstance(kind, str):
        raise ValueError("kind is not a string")
    if "messages" in found:
        messages = found["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages is not a list of messages")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError("a message has no role")
            if not isinstance(message.get("content"), str):
                raise ValueError("the content of a message is not a string")
        return Row(messages=messages, kind=kind)
    prompt, answer = found.get("prompt"), found.get("answer", [])
    for name, tokens in (("prompt", prompt), ("answer", answer)):
        if not isinstance(tokens, list) or not all(type(one) is int and 0 <= one < vocabulary for one in tokens):
            raise ValueError(f"{name} is not a list of the target's tokens")
    if not prompt:
        raise ValueError("prompt is empty")
    return Row(prompt=prompt, answer=answer, kind=kind)


def make_sample(bridge: Bridge, prompt: Sequence[int], answer: Sequence[int]) -> Sample | None:
    """What the drafter sees of an answer: the end of the prompt, and as much of the answer as it has cells for.

    None where nothing of the answer is left to learn.
    """
    transcript = Transcript(bridge, prompt[-READ_TOKENS:])
    start = max(1, transcript.extend(answer))  # the last tokens of the prompt may have been spelled anew
    tokens = list(transcript.tokens[:CELLS])
    return Sample(tokens, start) if len(tokens) > start else None


def hold_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers below `count` to train on, and those to measure on: a `share` of them, at least one if there are two."""
    order = [int(number) for number in np.random.default_rng(seed).permutation(count)]
    held = min(count - 1, max(1, round(share * count)))
    return sorted(order[held:]), sorted(order[:held])
