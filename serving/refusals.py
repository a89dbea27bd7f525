"""What is said instead of an answer."""

from __future__ import annotations

from guards import Verdict

REFUSAL = "I can't help with that request."
CARING = (
    f"{REFUSAL} If you are thinking of hurting yourself, you don't have to be alone with it: please talk to someone "
    "you trust, or call an emergency number or a crisis line where you live."
)
"""Where the prompt may be about self-harm."""

_LIKELY = 0.25  # of `self_harm`, of what should not be answered: kind words too many do no harm


def refusal(judged: Verdict | None) -> str:
    """For a prompt that is refused. None: because the guard failed."""
    if judged is not None and judged.categories.get("self_harm", 0.0) > _LIKELY * judged.score:
        return CARING
    return REFUSAL


def is_refusal(answer: str) -> bool:
    """Whether an answer was such a refusal."""
    return answer.strip() in (REFUSAL, CARING)
