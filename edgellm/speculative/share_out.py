"""How many drafted tokens of each answer the next step should verify: so many that the most tokens a second come out.

Plain arithmetic. A drafted token counts with the probability that it and all before it are accepted; a step costs what
`StepCosts` says. Tokens are added in the order of these probabilities, over all answers, and the best of all the sums
is taken: the cost by rows has steps and bends, so the first one that does not pay need not be the last that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

GAIN = 1.03
"""What is foreseen must beat drafting nothing by as much: it is not known that well."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step should verify."""

    counts: list[int]  # drafted tokens of each answer
    rate: float  # tokens a second that are to be expected


def share_out(
    chances: Sequence[Sequence[float]],
    *,
    answers: int,
    rows: int,
    room: int,
    seconds: Callable[[int], float],
    offset_s: float = 0.0,
) -> Plan:
    """How many of each answer's drafted tokens to verify.

    `chances`: for each answer with drafts, the probability of each of its tokens, those before it being accepted. Of
    `rows` rows that the step has without drafts, `answers` give a token each; at most `room` rows may be added.
    `seconds` are by rows. `offset_s`: what drafting them took or will take.
    """
    counts = [0] * len(chances)
    best = list(counts)
    # Rows of prompts are work that is to be done anyway: what drafts add is weighed against a step without them.
    beside_s = offset_s - (seconds(rows) - seconds(answers)) if rows > answers else offset_s
    # Without drafts nothing is spent on them either.
    best_rate = answers / (seconds(rows) + beside_s - offset_s)
    least = GAIN * best_rate
    together = [chance[0] if chance else 0.0 for chance in chances]  # that the next token of each is accepted
    expected = float(answers)
    for added in range(1, room + 1):
        index = max(range(len(chances)), key=together.__getitem__, default=-1)
        if index < 0 or together[index] <= 0.0:
            break
        expected += together[index]
        counts[index] += 1
        chance = chances[index]
        together[index] *= chance[counts[index]] if counts[index] < len(chance) else 0.0
        rate = expected / (seconds(rows + added) + beside_s)
        if rate > max(least, best_rate):
            best_rate, best = rate, list(counts)
    return Plan(best, best_rate)
