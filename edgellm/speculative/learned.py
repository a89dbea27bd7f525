"""What drafting has learned about a model and this machine, on disk: numbers, no text."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.models.files import write_atomic
from edgellm.speculative.costs import WIDTHS

_log = logging.getLogger(__name__)
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Learned:
    """Of one target model."""

    steps: Mapping[int, float]  # seconds by rows, as StepCosts.measured gives them
    weights: Mapping[str, tuple[float, ...]]  # of each proposer's Acceptance


def read_learned(path: Path, machine: str) -> Learned | None:
    """What was written for the same `machine` (whatever changes the time of a step); None if there is nothing sound."""
    try:
        data = json.loads(path.read_bytes())
        if data["version"] != _VERSION:
            return None
        steps = {int(rows): _number(seconds) for rows, seconds in data["steps"].items()}
        if min(steps.values(), default=0.0) <= 0 or not steps.keys() <= set(WIDTHS) or 1 not in steps:
            raise ValueError("no step times")
        weights = {name: tuple(_number(value) for value in values) for name, values in data["weights"].items()}
        return Learned(steps if data["machine"] == machine else {}, weights)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is not used: %s", path.name, error)
        return None


def write_learned(path: Path, machine: str, learned: Learned) -> None:
    """Atomic. Raises OSError."""
    body = {
        "version": _VERSION,
        "machine": machine,
        "steps": {str(rows): seconds for rows, seconds in learned.steps.items()},
        "weights": {name: list(values) for name, values in learned.weights.items()},
    }
    write_atomic(path, json.dumps(body).encode())


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"not a number: {value!r}")
    return float(value)
