"""What one adaptation of a drafter is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from edgellm.errors import ConfigError
from edgellm.tune.scheme import check_scheme

_WHOLE = ("epochs", "batch_size", "rank", "drafts", "row_tokens", "threads", "answers", "measured")


@dataclass(frozen=True, slots=True)
class AdaptationSpec:
    """Raises ConfigError for numbers that make no adaptation."""

    drafter: Path
    target: Path
    buffer: Path  # edgellm/speculative/buffer.py
    output: Path  # the adapter, if it turns out better than what there is
    earlier: Path | None = None  # the adapter in use so far: it is trained further
    answers: int = 128  # that it is trained on, the latest ones: asking the target takes longest
    epochs: int = 2
    batch_size: int = 8  # answers a step
    learning_rate: float = 1e-3
    rank: int = 32  # alpha is twice the rank
    sparsity: str = "none"  # what is trained: edgellm/tune/scheme.py; `earlier` keeps its own, and its rank
    top: int = 0  # tokens whose probabilities the target is asked for at each place; 0: what it wrote is all it wanted
    row_tokens: int = 768  # of an answer with its prompt, in drafter tokens
    recompute: bool = False  # half the memory for a third more time
    drafts: int = 4  # tokens of a draft, while acceptance is measured
    measured: int = 32  # held-out answers that it is measured on, the latest ones
    margin: float = 0.01  # by which acceptance must rise
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _WHOLE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.top < 0:
            raise ConfigError(f"top must be at least 0, not {self.top}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"the learning rate must be a positive number, not {self.learning_rate}")
        if not 0 <= self.margin < 1:
            raise ConfigError(f"the margin must be from 0 to 1, not {self.margin}")
        if self.sparsity == "auto":
            raise ConfigError("sparsity: an adaptation needs a scheme")
        check_scheme(self.sparsity)

    def options(self) -> list[str]:
        """What the process `edgellm.tune.adaptation` is told with."""
        found: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is True:
                found.append(option(field.name))
            elif value is not None and value is not False:
                found += [option(field.name), str(value)]
        return found


def option(field: str) -> str:
    """A field's name on the command line."""
    return "--from" if field == "earlier" else "--" + field.replace("_", "-")
