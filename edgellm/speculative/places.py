"""Where drafting keeps what it has learned, below the state directory: a folder for each model that is drafted for."""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = "speculative"
_MARK_DIGITS = 16
_READ_BYTES = 1 << 20


def model_folder(home: Path, target: Path) -> Path:
    """What belongs to the model in the file `target`."""
    return home / FOLDER / target.stem


def learned_path(home: Path, target: Path) -> Path:
    """Step times and regression weights: learned.py."""
    return model_folder(home, target) / "learned.json"


def answers_path(home: Path, target: Path) -> Path:
    """What the model wrote lately: buffer.py."""
    return model_folder(home, target) / "answers"


def adapter_path(home: Path, target: Path, drafter: Path) -> Path:
    """What the model in the file `drafter` has learned of `target`, if it has; another file has another. Raises OSError
    if there is no such file."""
    return model_folder(home, target) / f"{drafter.stem}-{file_mark(drafter)}.gguf"


def merged_path(adapter: Path) -> Path:
    """The drafter with `adapter` in its weights: what drafts."""
    return adapter.with_suffix(".merged.gguf")


def file_mark(path: Path) -> str:
    """Tells a model's file from others by its size, its beginning and its end. Raises OSError."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_READ_BYTES))
        file.seek(max(0, size - _READ_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:_MARK_DIGITS]


def ngrams_path(home: Path, drafter: bytes, target: bytes) -> Path:
    """Which tokens of one vocabulary spell those of the other, by their fingerprints: ngram_cache.py."""
    return home / FOLDER / f"{drafter.hex()[:_MARK_DIGITS]}-{target.hex()[:_MARK_DIGITS]}.ngrams"
