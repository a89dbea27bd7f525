"""The labelled prompts that the guard is trained on, and the folds in which it is measured.

Input files are those of the data set's README: `prompts.jsonl` with `text`, `label`, `kind`, `source`, `lang`, `id`;
`jailbreak_templates.jsonl` with `template`, `placeholder`, `source`, `id`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLACEHOLDER = "{prompt}"
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

    @property
    def family(self) -> str:
        """What must not stand on both sides of a split within a source: versions of one question in other languages."""
        if self.source == "multijail":
            return f"multijail-{(int(self.id.rpartition('-')[2]) - 1) // MULTIJAIL_LANGUAGES}"
        return self.id


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


def load_prompts(folder: Path) -> list[Prompt]:
    """All labelled prompts."""
    return [
        Prompt(row["text"], row["label"] == "unsafe", row["kind"], row["source"], row["lang"], row["id"])
        for row in _rows(folder / "prompts.jsonl")
    ]


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


def make_folds(prompts: Iterable[Prompt], templates: Iterable[Template]) -> list[Fold]:
    """One fold for each harmful source; template sources and benign sources are dealt out over them, for like numbers
    of benign rows."""
    rows = list(prompts)
    harmful = sorted({row.source for row in rows if row.unsafe})
    sizes = Counter(row.source for row in rows if not row.unsafe)
    template_sources = sorted({template.source for template in templates})
    benign: list[set[str]] = [set() for _ in harmful]
    loads = [0] * len(harmful)
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = min(range(len(harmful)), key=loads.__getitem__)
        benign[least].add(name)
        loads[least] += sizes[name]
    return [
        Fold(
            frozenset({name}),
            frozenset({template_sources[index % len(template_sources)]}),
            frozenset(benign[index]),
        )
        for index, name in enumerate(harmful)
    ]


def _rows(file: Path) -> Sequence[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
