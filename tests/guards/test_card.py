"""The card beside the weights, and files that are not what they should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from guards import Guard, GuardModelError
from guards.card import Scale, read_card, sigmoid
from guards.guard import MODEL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def _changed(folder: Path, **changes: Any) -> Path:
    file = folder / "card.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_a_scale() -> None:
    assert Scale(2.0, -1.0).probability(0.5) == 0.5
    assert sigmoid(-1000.0) == 0.0
    assert sigmoid(1000.0) == 1.0


def test_what_is_shipped_is_sound() -> None:
    card = read_card(MODEL / "card.json")
    assert 0 < card.thresholds["strict"] < card.thresholds["balanced"] < 1
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 40e6
    assert Guard("strict").threshold == card.thresholds["strict"]


@pytest.mark.parametrize("name", ["card.json", "first.onnx", "rest.onnx", "ngrams.npz", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
def test_files_that_are_missing_or_unsound(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(GuardModelError):
        Guard(folder=folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": ["unsafe", "jailbreak"]},
        {"outputs": ["jailbreak", "unsafe"]},
        {"scales": {}},
        {"thresholds": {"strict": 0.5}},
        {"window_tokens": "many"},
        {"weights": {"network": 1.0}},
        {"foreign_weights": None},
        {"passing": {"unsafe": 0.0, "jailbreak": 0.0}},
        {"foreign": 1.0},
        {"handicaps": {"sentence": 1.0, "doubling": 0.5}},
        {"handicaps": {"sentence": 1.0, "doubling": 0.5, "doublings": None}},
    ],
)
def test_cards_that_do_not_fit(folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(GuardModelError):
        Guard(folder=_changed(folder, **changes))
