"""Training texts that the data lacks: questions in jailbreak wrappers, and questions in long harmless surroundings.

Length, language and place must not tell the label: every kind of wrapper is filled with harmful and with harmless
questions alike, and long surroundings hold both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from guard_model.data import PLACEHOLDER, Prompt, Template
from guards.categories import Category


@dataclass(frozen=True, slots=True)
class Example:
    """A text with its labels; `focus` is the part of it that the label `unsafe` comes from, if not the whole."""

    text: str
    unsafe: bool
    jailbreak: bool
    source: str
    lang: str
    kind: str
    focus: tuple[int, int] | None = None  # begin and end in characters
    categories: frozenset[Category] = frozenset()  # as a Prompt's


_FEW_WORDS = 0.6  # how often the surroundings are only 4 to 50 words
_JOINTS = ("\n\n", " ", "\n---\n", "\n\nQuestion: ", "\n\nUser: ", " Also, ", "\n\nBy the way: ", "\n\nNow: ")


def plain(prompt: Prompt) -> Example:
    """The prompt as it is."""
    return Example(
        prompt.text, prompt.unsafe, False, prompt.source, prompt.lang, prompt.kind, categories=prompt.categories
    )


def wrapped(question: Prompt, template: Template) -> Example:
    """The question in a jailbreak's place for it."""
    before = template.text.index(PLACEHOLDER)
    kind = "jailbreak" if question.unsafe else "wrapped"
    focus = (before, before + len(question.text))
    text = template.around(question.text)
    return Example(text, question.unsafe, True, question.source, question.lang, kind, focus, question.categories)


def surrounded(question: Prompt, carrier: Prompt, chance: random.Random) -> Example:
    """The question before, after or in the middle of a harmless text, or of a few words of it."""
    joint = chance.choice(_JOINTS)
    words = carrier.text.split(" ")
    if chance.random() < _FEW_WORDS:
        count = chance.randint(4, 50)
        begin = chance.randrange(max(1, len(words) - count))
        words = words[begin : begin + count]
    where = chance.choice(("before", "after", "after", "middle"))
    if where == "before":
        text, begin = question.text + chance.choice(("\n\n", "\n---\n", " ")) + " ".join(words), 0
    else:
        head, tail = " ".join(words), ""
        if where == "middle":
            cut = chance.randrange(len(words) + 1)
            head, tail = " ".join(words[:cut]), " " + " ".join(words[cut:])
        begin = len(head) + len(joint)
        text = head + joint + question.text + tail
    kind = "surrounded" if question.unsafe else "benign"
    focus = (begin, begin + len(question.text))
    return Example(text, question.unsafe, False, question.source, question.lang, kind, focus, question.categories)


def augmented(
    prompts: Sequence[Prompt],
    templates: Sequence[Template],
    *,
    wrapped_each: int,
    surrounded_each: int,
    seed: int,
) -> list[Example]:
    """The prompts themselves; with each template, `wrapped_each` harmful questions and as many harmless ones;
    `surrounded_each` harmful questions and as many harmless ones in long harmless texts."""
    chance = random.Random(seed)
    harmful = [prompt for prompt in prompts if prompt.unsafe]
    short = [prompt for prompt in prompts if not prompt.unsafe and len(prompt.text) < 400]
    long = [prompt for prompt in prompts if not prompt.unsafe and len(prompt.text) > 300]
    examples = [plain(prompt) for prompt in prompts]
    for template in templates:
        for questions in (harmful, short):
            picked = chance.sample(questions, min(wrapped_each, len(questions)))
            examples += [wrapped(question, template) for question in picked]
    for questions in (harmful, short):
        for _ in range(surrounded_each):
            examples.append(surrounded(chance.choice(questions), chance.choice(long), chance))
    return examples
