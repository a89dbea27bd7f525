"""What is wrong with a training file, line by line, and what was done with examples that do not fit."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgellm.errors import TrainingDataError

FAULTS_MAX = 100


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that was done with the example of a line, for the job's events."""

    line: int  # from 1
    message: str


@dataclass(slots=True)
class Faults:
    """Collects (line, message), lines from 1, 0 for the whole file. Takes FAULTS_MAX of them and is full then."""

    found: list[tuple[int, str]] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Whether reading on is of no use."""
        return len(self.found) >= FAULTS_MAX

    def add(self, line: int, message: str) -> None:
        """Take a fault, unless there are too many."""
        if not self.full:
            self.found.append((line, message))

    def check(self, param: str) -> None:
        """Raise TrainingDataError if there are any."""
        if self.found:
            raise TrainingDataError(self.found, param, more=self.full)


class ExampleError(Exception):
    """The example at hand is faulty. Becomes a line of a TrainingDataError; never leaves `edgellm.tune`."""
