"""What one fine-tuning run is told: the order that travels, as JSON, to the process that trains."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from edgellm.errors import ConfigError
from edgellm.tune.examples import Method
from edgellm.tune.scheme import check_scheme

ROW_TOKENS = 512
"""The training length, if nothing else is asked for."""

_WHOLE = ("epochs", "batch_size", "rank", "checkpoint_steps", "memory_budget_bytes", "threads", "validations_per_epoch")
_NUMBERS = ("beta", "learning_rate_multiplier", "alpha", "time_budget_s")


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What to train, on what, and how. Paths are text. None: chosen by the trainer (edgellm/tune/defaults.py).

    Raises ConfigError for what makes no run.
    """

    model: str
    data: str
    output: str  # the adapter; its metrics go beside it
    state: str | None = None  # a private folder: checkpoints go there, and a run is gone on with from there
    validation: str | None = None
    method: Method = "supervised"
    beta: float | None = None  # of dpo
    epochs: int | None = None
    batch_size: int | None = None  # examples a step
    learning_rate_multiplier: float | None = None  # of the trainer's own rate
    rank: int | None = None
    alpha: float | None = None
    rank_stabilised: bool = False
    sparsity: str = "auto"  # or a scheme: edgellm/tune/scheme.py
    memory_budget_bytes: int | None = None  # most private memory of the process
    time_budget_s: float | None = None  # about how long it may take; a wish, not a limit
    checkpoint_steps: int | None = None
    validations_per_epoch: int = 1
    row_tokens: int = ROW_TOKENS
    seed: int = 0
    threads: int = 1
    only_plan: bool = False  # analyse, tell, and end
    analysis: str | None = None  # a file: the model's contribution analysis is kept there, and not made again

    def __post_init__(self) -> None:
        if self.method not in ("supervised", "dpo"):
            raise ConfigError(f"method must be supervised or dpo, not {self.method!r}")
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"{name} must be at least 1, not {value!r}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number, not {value!r}")
        if not isinstance(self.row_tokens, int) or self.row_tokens < 16:
            raise ConfigError(f"row_tokens must be at least 16, not {self.row_tokens!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed must be a whole number from 0, not {self.seed!r}")
        check_scheme(self.sparsity)

    def to_json(self) -> str:
        """What `parse` takes."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> RunSpec:
        """Raises ConfigError, also for fields that there are not."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the run's specification is no JSON: {error}") from None
        if not isinstance(given, Mapping):
            raise ConfigError("the run's specification must be an object")
        known = {field.name for field in fields(RunSpec)}
        if unknown := sorted(set(given) - known):
            raise ConfigError(f"a run has no field {unknown[0]!r}")
        if missing := sorted({"model", "data", "output"} - set(given)):
            raise ConfigError(f"a run needs the field {missing[0]!r}")
        values: dict[str, Any] = dict(given)
        return RunSpec(**values)
