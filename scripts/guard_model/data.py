"""The labelled prompts that the guard is trained on, and the folds in which it is measured.

Input files are those of the data set's README: `prompts.jsonl` with `text`, `label`, `kind`, `category`, `source`,
`lang`, `id`; `jailbreak_templates.jsonl` with `template`, `placeholder`, `source`, `id`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from guard_model.labels import categories, is_advice
from guards.categories import CATEGORIES, Category

PLACEHOLDER = "{prompt}"
WRITTEN = "written"
"""The source of the prompts that were written for this guard, in `written/`."""

MULTIJAIL_LANGUAGES = 10  # versions of each of its questions, one after the other


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and whether it should not be answered."""

    text: str
    unsafe: bool
    kind: str  # direct, jailbreak, benign, hard_negative
    source: str
    lang: str
    id: str
    categories: frozenset[Category] = frozenset()  # of an unsafe text; empty: not known
    pair: str | None = None  # of a prompt that is told from another by few words
    agreed: bool = True  # an unsafe one: read again for this guard, it was found to be so

    @property
    def family(self) -> str:
        """What must not stand on both sides of a split within a source: versions of one question in other languages."""
        if self.source == "multijail":
            return f"multijail-{(int(self.id.rpartition('-')[2]) - 1) // MULTIJAIL_LANGUAGES}"
        return self.pair or self.id


@dataclass(frozen=True, slots=True)
class Template:
    """A wrapper around a question. `text` holds PLACEHOLDER once or more."""

    text: str
    source: str
    id: str

    def around(self, question: str) -> str:
        """The question in its place. Braces elsewhere mean nothing."""
        return self.text.replace(PLACEHOLDER, question)


@dataclass(frozen=True)
class Fold:
    """Sources left out of training, of each sort some."""

    harmful: frozenset[str]
    templates: frozenset[str]
    benign: frozenset[str]

    def holds_out(self, prompt: Prompt) -> bool:
        """Whether the prompt is measured on, not trained on."""
        return prompt.source in self.harmful or prompt.source in self.benign


def load_prompts(folder: Path, *, advice: bool = False) -> list[Prompt]:
    """All labelled prompts; `advice`: also those that their source calls unsafe and that may well be answered
    (`labels.is_advice`)."""
    prompts = [
        Prompt(
            row["text"],
            row["label"] == "unsafe",
            row["kind"],
            row["source"],
            row["lang"],
            row["id"],
            categories(row["source"], row["category"]) if row["label"] == "unsafe" else frozenset(),
        )
        for row in _rows(folder / "prompts.jsonl")
        if advice or row["label"] == "safe" or not is_advice(row["category"])
    ]
    readings = load_readings()
    return [replace(prompt, agreed=(prompt.source, prompt.family) not in readings) for prompt in prompts]


def load_readings(file: Path = Path(__file__).parent / "readings.tsv") -> dict[tuple[str, str], str]:
    """What was read of prompts that their sources call unsafe, where it was not that: `answerable` (any careful
    assistant answers them) or `doubtful` (careful people would not agree), by source and family."""
    rows = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
    return {(source, family): reading for reading, source, family in rows}


def load_written(folder: Path = Path(__file__).parent / "written") -> list[Prompt]:
    """What was written for this guard, to be trained on whatever is left out. Files of tab-separated values: label,
    language, category (`-`: none), pair (`-`: none), text."""
    found = []
    for file in sorted(folder.glob("*.tsv")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            label, lang, category, pair, text = line.split("\t")
            unsafe = label == "unsafe"
            named = frozenset({cast(Category, category)}) if category in CATEGORIES else frozenset()
            kind, family = "direct" if unsafe else "benign", None if pair == "-" else f"{file.stem}-{pair}"
            found.append(Prompt(text, unsafe, kind, WRITTEN, lang, f"{WRITTEN}-{file.stem}-{number}", named, family))
    return found


def load_templates(folder: Path) -> list[Template]:
    """Wrappers that say where the question goes."""
    return [
        Template(row["template"], row["source"], row["id"])
        for row in _rows(folder / "jailbreak_templates.jsonl")
        if row["placeholder"] and PLACEHOLDER in row["template"]
    ]


def part_of(name: str, parts: int, *, seed: int = 0) -> int:
    """Which of `parts` parts a name belongs to: the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % parts


def make_folds(prompts: Iterable[Prompt], templates: Iterable[Template], count: int | None = None) -> list[Fold]:
    """`count` folds (default: one for each harmful source), and one for each source of hard negatives, of which there
    are too few for every fold to be trained on some of them otherwise. Harmful and benign sources but WRITTEN are dealt
    out over the folds, each for like numbers of rows, so that every one is held out once; template sources by turns."""
    rows = [prompt for prompt in prompts if prompt.source != WRITTEN]
    harmful = _dealt(Counter(row.source for row in rows if row.unsafe), count)
    benign = _dealt(Counter(row.source for row in rows if row.kind == "benign"), len(harmful))
    near = sorted({row.source for row in rows if row.kind == "hard_negative"})
    names = sorted({template.source for template in templates})
    folds = [
        Fold(bad, frozenset({names[index % len(names)]}), good)
        for index, (bad, good) in enumerate(zip(harmful, benign, strict=True))
    ]
    return folds + [Fold(frozenset(), frozenset(), frozenset({name})) for name in near]


def _dealt(sizes: Counter[str], count: int | None) -> list[frozenset[str]]:
    if count is None:
        return [frozenset({name}) for name in sorted(sizes)]
    hands: list[set[str]] = [set() for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = min(range(count), key=loads.__getitem__)
        hands[least].add(name)
        loads[least] += sizes[name]
    return [frozenset(hand) for hand in hands]


def _rows(file: Path) -> Sequence[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
