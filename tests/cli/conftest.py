from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.tune.process import Outcome
from serving.cli import tune_run
from tests.cli.recorded import USUAL, Recorded, finish, write_data
from tests.support.tiny_gguf import write_tiny_llama


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    monkeypatch.setattr(Recorded, "script", [*USUAL, finish])
    monkeypatch.setattr(Recorded, "end", Outcome("done"))
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(tune_run, "TrainerProcess", Recorded)
    monkeypatch.setattr(tune_run, "torch_missing", lambda: False)
    return Recorded


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "Base Model.gguf")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "My rows.jsonl")
