"""What is trained on and what is measured on, for a fold: nothing of one side stands on the other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from guard_model.data import Fold, Prompt, Template, part_of

_PARTS = 20  # one of them is the in-distribution split
_FILLED = 400  # templates of a fold with questions in them
_QUESTION = 400  # characters at most
NEAR_MISSES = frozenset({"coconot"})
"""Sources of kind `benign` that were made to look like what should not be answered: measured as hard negatives."""


@dataclass
class Split:
    """Prompts to train on, and sets to measure on, by name."""

    train: list[Prompt]
    templates: list[Template]
    sets: dict[str, list[Prompt]] = field(default_factory=dict)


def split(
    prompts: Sequence[Prompt],
    templates: Sequence[Template],
    fold: Fold | None,
    *,
    most: int = 1000,
    seed: int = 0,
) -> Split:
    """`fold` None: only the in-distribution split is left out. `most`: prompts of a set. Prompts whose label a second
    reading did not share are measured, not trained on.

    Sets: `direct` (harmful sources left out), `jailbreak` (these in templates of sources left out), `wrapped` (harmless
    questions in them), `benign` (benign sources left out, as many of each), `hard_negative` (those left out, and
    NEAR_MISSES left out), and `in_distribution` (of the sources trained on).
    """
    chance = random.Random(seed)
    out = fold or Fold(frozenset(), frozenset(), frozenset())
    kept = [prompt for prompt in prompts if not out.holds_out(prompt)]
    inside = [prompt for prompt in kept if part_of(prompt.family, _PARTS, seed=seed) == 0]
    train = [prompt for prompt in kept if prompt.agreed and part_of(prompt.family, _PARTS, seed=seed) != 0]
    found = Split(train, [template for template in templates if template.source not in out.templates])
    sets = found.sets
    direct = [prompt for prompt in prompts if prompt.source in out.harmful]
    sets["direct"] = _some(direct, most, chance)
    wrappers = [template for template in templates if template.source in out.templates]
    benign = [prompt for prompt in prompts if prompt.source in out.benign]
    harmless = [prompt for prompt in benign if len(prompt.text) < _QUESTION]
    if wrappers:
        for name, questions in (("jailbreak", direct), ("wrapped", harmless)):
            if questions:
                filled = (_filled(name, chance.choice(wrappers), chance.choice(questions)) for _ in range(_FILLED))
                sets[name] = list(filled)
    near = [prompt for prompt in benign if prompt.kind == "hard_negative" or prompt.source in NEAR_MISSES]
    sets["hard_negative"] = _some(near, most, chance)
    sets["benign"] = _evenly(
        [prompt for prompt in benign if prompt.kind == "benign" and prompt.source not in NEAR_MISSES], most, chance
    )
    sets["in_distribution"] = _some(inside, 2 * most, chance)
    return found


def _filled(kind: str, template: Template, question: Prompt) -> Prompt:
    return Prompt(
        template.around(question.text),
        question.unsafe,
        kind,
        template.source,
        question.lang,
        f"{template.id}+{question.id}",
        agreed=question.agreed,
    )


def _some(prompts: Sequence[Prompt], most: int, chance: random.Random) -> list[Prompt]:
    return chance.sample(list(prompts), min(most, len(prompts)))


def _evenly(prompts: Sequence[Prompt], most: int, chance: random.Random) -> list[Prompt]:
    sources = sorted({prompt.source for prompt in prompts})
    found: list[Prompt] = []
    for name in sources:
        found += _some([prompt for prompt in prompts if prompt.source == name], most // len(sources), chance)
    return found
