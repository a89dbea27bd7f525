"""Tiny model files, written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_gguf import write_tiny_bert, write_tiny_llama, write_tiny_lora, write_tiny_mamba


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine-models")


@pytest.fixture(scope="session")
def llama(files: Path) -> Path:
    return write_tiny_llama(files / "llama.gguf", context=4096)


@pytest.fixture(scope="session")
def other_llama(files: Path) -> Path:
    return write_tiny_llama(files / "other.gguf", seed=1)


@pytest.fixture(scope="session")
def qwen(files: Path) -> Path:
    return write_tiny_llama(files / "qwen.gguf", architecture="qwen2")


@pytest.fixture(scope="session")
def mamba(files: Path) -> Path:
    return write_tiny_mamba(files / "mamba.gguf")


@pytest.fixture(scope="session")
def bert(files: Path) -> Path:
    return write_tiny_bert(files / "bert.gguf")


@pytest.fixture(scope="session")
def loras(files: Path, llama: Path) -> dict[str, Path]:
    return {name: write_tiny_lora(files / f"{name}.gguf", llama, seed=seed) for name, seed in (("one", 1), ("two", 2))}
