"""Training runs: a classifier for each fold, scored on what it never saw, and the one that is shipped."""

from __future__ import annotations

import functools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from guard_model import ngrams
from guard_model.augment import Example, augmented
from guard_model.calibrate import Calibration
from guard_model.data import WRITTEN, Fold, Prompt
from guard_model.encoder import Encoder, pretrained
from guard_model.encoding import OUTPUTS, OVERLAP, WINDOW, Encoding, Window
from guard_model.export import NGRAMS, write_model
from guard_model.scoring import Scored, scored
from guard_model.splits import Split
from guard_model.training import Recipe, train
from guards import Guard
from guards.card import LEVELS, Scale

UNCALIBRATED = Calibration({name: Scale() for name in OUTPUTS}, dict.fromkeys(LEVELS, 0.5), Scale(), -math.inf)

LONG = 300  # characters: of longer harmless prompts only some are trained on, for they are many and cost the most


@dataclass(frozen=True, slots=True)
class Mix:
    """What an epoch is made of."""

    wrapped_each: int = 7
    surrounded_each: int = 4000
    long_share: float = 0.25  # of harmless prompts over LONG characters, drawn anew for each epoch
    foreign_share: float = 0.3  # of what is not in English, for the encoder, whose words are; the n-grams take it all
    near_share: float = 0.05  # of hard negatives: more of them teach that what is unlike the training data is safe


def fold_name(fold: Fold | None) -> str:
    """For files and tables: its harmful sources, or the benign ones where it has none."""
    return "+".join(sorted(fold.harmful or fold.benign)) if fold else "all"


def trained(found: Split, name: str, *, encoder_folder: Path, folder: Path, recipe: Recipe, mix: Mix) -> int:
    """Trains a classifier on what `found` leaves it and writes its n-grams to NGRAMS and its state to
    `state.pt` in `folder`, unless they are there. Returns the seconds that it took, then or now."""
    file, log = folder / "state.pt", folder / "log.json"
    if file.is_file():
        return int(json.loads(log.read_text(encoding="utf-8"))["seconds"])
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    encoding = Encoding(encoder_folder / "tokenizer.json")
    torch.manual_seed(recipe.seed)
    encoder: Encoder = pretrained(encoder_folder / "model.safetensors", recipe.layers, recipe.early)
    print(f"{name}: {len(found.train)} prompts, {len(found.templates)} templates", file=sys.stderr)
    every = _epochs(found, encoding, recipe, mix, foreign_share=1.0)
    ngrams.fitted(every(0), recipe.seed).write(folder / NGRAMS)
    train(encoder, _epochs(found, encoding, recipe, mix, foreign_share=mix.foreign_share), recipe)
    torch.save(encoder.state_dict(), file.with_suffix(".part"))
    seconds = round(time.monotonic() - began)
    log.write_text(json.dumps({"seconds": seconds, "prompts": len(found.train)}) + "\n", encoding="utf-8")
    file.with_suffix(".part").replace(file)
    return seconds


def judged(found: Split, name: str, *, encoder_folder: Path, folder: Path, recipe: Recipe) -> list[Scored]:
    """The classifier of `trained`, written to `folder` with a card that scales nothing and lets
    nothing pass, and what it says of the sets that it did not see."""
    encoder: Encoder = pretrained(encoder_folder / "model.safetensors", recipe.layers, recipe.early)
    encoder.load_state_dict(torch.load(folder / "state.pt"))
    write_model(encoder, encoder_folder / "tokenizer.json", folder)
    write_card(folder, UNCALIBRATED, recipe)
    guard = Guard(folder=folder)
    rows: list[Scored] = []
    for members_name, members in found.sets.items():
        rows += scored(guard, name, members_name, members)
    return rows


def write_card(folder: Path, found: Calibration, recipe: Recipe, **more: object) -> None:
    """`card.json` as `guards.card.read_card` reads it. `more`: what is for people."""
    card = {
        "version": "untrained",
        "outputs": list(OUTPUTS),
        "scales": {name: asdict(scale) for name, scale in found.scales.items()},
        "thresholds": found.thresholds,
        "jailbreak_threshold": 0.5,
        "foreign": asdict(found.foreign),
        "weights": asdict(recipe.weights),
        "foreign_weights": asdict(recipe.foreign_weights),
        "passing": {
            "unsafe": found.passing,
            "jailbreak": -math.inf if found.passing == -math.inf else 0.0,
            "sentence": recipe.sentence_passing,
        },
        "handicaps": asdict(recipe.handicaps),
        "window_tokens": WINDOW,
        "overlap_tokens": OVERLAP,
        **more,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _epochs(
    found: Split, encoding: Encoding, recipe: Recipe, mix: Mix, *, foreign_share: float
) -> Callable[[int], Sequence[Window]]:
    @functools.lru_cache(maxsize=2)  # heads and layers are trained on the same epochs, one after the other
    def windows(epoch: int) -> Sequence[Window]:
        seed = 1000 * recipe.seed + epoch
        chance = random.Random(seed)
        examples = mixed(found, mix, chance, seed)
        kept = [each for each in examples if each.lang == "en" or chance.random() < foreign_share]
        return encoding.training_windows(kept, chance)

    return windows


def mixed(found: Split, mix: Mix, chance: random.Random, seed: int) -> list[Example]:
    """What is trained on in one pass: `chance` picks prompts, `seed` what is made of them."""
    kept = [prompt for prompt in found.train if chance.random() < _share(prompt, mix)]
    return augmented(
        kept, found.templates, wrapped_each=mix.wrapped_each, surrounded_each=mix.surrounded_each, seed=seed
    )


def _share(prompt: Prompt, mix: Mix) -> float:
    if prompt.unsafe or prompt.source == WRITTEN:
        return 1.0
    if prompt.kind == "hard_negative":
        return mix.near_share
    return mix.long_share if len(prompt.text) > LONG else 1.0
