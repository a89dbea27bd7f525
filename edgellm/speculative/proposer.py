"""What all proposers have in common: they guess the tokens that follow, and say what they know about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgellm.speculative.acceptance import Acceptance

Evidence = tuple[float, ...]


@dataclass(slots=True, eq=False)
class Prompt:
    """What the answers to one prompt share."""

    tokens: Sequence[int]
    temperature: float
    prediction: Sequence[int] = ()  # what the client expects the answer to be
    shared: Any = None  # what a proposer made of the prompt, for the other answers


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens that may follow, in the target's vocabulary."""

    tokens: tuple[int, ...]
    evidence: tuple[Evidence, ...]  # of each token, for the proposer's `acceptance`
    chances: tuple[float, ...]  # what that makes of it: that each token is accepted if those before it are


@dataclass(frozen=True, slots=True)
class Want:
    """An answer that a proposer is asked about."""

    state: Any  # the proposer's own, from `begin`
    context: Sequence[int]  # prompt and answer so far
    limit: int  # most tokens, at least 1
    least: float = (
        0.0  # what is accepted with less probability than this, all before it included, is not worth its cost
    )


@dataclass(frozen=True, slots=True)
class Outlook:
    """What asking a proposer about an answer would take and bring, as far as that is known before."""

    pending: int  # rows that it would have to compute first
    chance: float  # that a token is accepted if those before it are
    first: bool = False  # nothing of the answer has been read yet, so that it is the prompt that is pending


class Proposer(Protocol):
    """Guesses. Wrong ones cost time, never correctness."""

    name: str
    acceptance: Acceptance

    def begin(self, prompt: Prompt) -> Any:
        """The state of an answer that is about to begin."""
        ...

    def extend(self, state: Any, tokens: Sequence[int]) -> None:
        """The answer went on with `tokens`."""
        ...

    def propose(self, wants: Sequence[Want]) -> list[Guess | None]:
        """A guess for each of `wants`, None where there is none."""
        ...

    def judge(self, state: Any, guess: Guess, fits: Sequence[bool]) -> None:
        """Whether the first tokens of a guess were what followed, whether they were drafted or not: some that were,
        then perhaps one that was not."""
        ...

    def end(self, state: Any, answer: Sequence[int]) -> None:
        """The answer is over."""
        ...

    def forget(self) -> None:
        """Whatever was learned from texts, and the texts."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...
