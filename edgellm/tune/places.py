"""Where fine-tuning keeps what is neither in its database nor a file of the user's."""

from __future__ import annotations

from pathlib import Path

FOLDER = "tuning"
"""Below the state directory: a folder for each job, runs of the terminal, analyses."""


def analysis_path(home: Path, model_sha256: str) -> Path:
    """The contribution analysis of the model of that hash (edgellm/tune/hashes.py)."""
    return home / FOLDER / "analysis" / f"{model_sha256}.json"
