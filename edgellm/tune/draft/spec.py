"""What one making of a drafter is told: the order that travels, as JSON, to the process that does it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from edgellm.errors import ConfigError
from edgellm.tune.draft.cut import Choice

TYPES = ("Q8_0", "Q4_1", "Q4_0")
"""What matrices can be written as: types of short blocks that are packed when they are loaded."""

_WHOLE = ("layers", "epochs", "pack_tokens", "answer_tokens", "measured_answers", "threads")
_POSITIVE = ("time_s", "learning_rate")


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """Which model is cut, for which target, and how it is trained. Paths are text.

    Raises ConfigError for what makes no run.
    """

    source: str  # the model that is cut
    target: str
    data: str
    output: str
    layers: int = 4
    choice: Choice = "even"
    vocabulary: int | None = 16384  # None: the source's
    type: str = "Q8_0"
    epochs: int = 10
    time_s: float | None = None  # of training; less is trained if need be
    learning_rate: float = 1e-3
    pack_tokens: int = 1024  # of a step
    softness: float = 0.0  # the part of the loss that what the target might have written has; 0: it is not asked
    held_share: float = 0.1  # of the answers are measured on, and not learned
    answer_tokens: int = 256  # most that the target writes where the data have no answer
    measured_answers: int = 32  # of those held out, through the real drafter
    low_priority: bool = True
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value!r}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number, not {value!r}")
        if self.choice not in get_args(Choice):
            raise ConfigError(f"layers are chosen as {', '.join(get_args(Choice))}, not as {self.choice!r}")
        if self.type not in TYPES:
            raise ConfigError(f"weights are written as {', '.join(TYPES)}, not as {self.type!r}")
        if not 0 <= self.softness <= 1:
            raise ConfigError(f"softness must be between 0 and 1, not {self.softness!r}")
        if not 0 < self.held_share < 1:
            raise ConfigError(f"held_share must be between 0 and 1, not {self.held_share!r}")

    def to_json(self) -> str:
        """What `parse` takes."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> DraftSpec:
        """Raises ConfigError, also for fields that there are not."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the specification is no JSON: {error}") from None
        if not isinstance(given, Mapping):
            raise ConfigError("the specification must be an object")
        if unknown := sorted(set(given) - {field.name for field in fields(DraftSpec)}):
            raise ConfigError(f"the specification has no field {unknown[0]!r}")
        if missing := sorted({"source", "target", "data", "output"} - set(given)):
            raise ConfigError(f"the specification needs the field {missing[0]!r}")
        values: dict[str, Any] = dict(given)
        return DraftSpec(**values)
