"""Where drafting keeps what it has learned, below the state directory: a folder for each model that is drafted for."""

from __future__ import annotations

from pathlib import Path

from edgellm.models.files import sha256_file

FOLDER = "speculative"
_MARK_DIGITS = 16


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
    """The adapter with which the model in the file `drafter` drafts, if there is one: another file has another. Reads
    the whole file. Raises OSError."""
    return model_folder(home, target) / f"{drafter.stem}-{sha256_file(drafter)[:_MARK_DIGITS]}.gguf"


def ngrams_path(home: Path, drafter: bytes, target: bytes) -> Path:
    """Which tokens of one vocabulary spell those of the other, by their fingerprints: ngram_cache.py."""
    return home / FOLDER / f"{drafter.hex()[:_MARK_DIGITS]}-{target.hex()[:_MARK_DIGITS]}.ngrams"
