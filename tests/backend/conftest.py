"""A tiny model and a context of 256 cells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from tests.support.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("backend") / "tiny.gguf")


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    made = Model(path)
    yield made
    made.close()


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    made = Context(model, ContextParams(context_tokens=256, sequences=4, batch_tokens=300, outputs=8, threads=1))
    yield made
    made.close()
