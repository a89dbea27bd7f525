"""Which models are packed when they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm import _kernels
from edgellm.config import Settings
from edgellm.engine import fit, loaded
from edgellm.models.describe import describe
from tests.support.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.skipif(not _kernels.kernels(), reason="this processor has no instructions for packed weights")


def packed_share(path: Path, settings: Settings) -> float:
    """Bytes of packed weights over those of the file's tensors."""
    info = describe(path)
    before = _kernels.packed_bytes()
    runner = loaded.load_runner(info, settings)
    share = (_kernels.packed_bytes() - before) / info.tensor_bytes
    runner.close()
    assert _kernels.packed_bytes() == before
    return share


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "quantised.gguf", weights="q8_0", vocab=512)


def test_a_quantised_model_is_packed(quantised: Path) -> None:
    assert packed_share(quantised, Settings()) > 0.9


def test_not_if_it_is_switched_off(quantised: Path) -> None:
    assert packed_share(quantised, Settings(packed_weights="off")) == 0


def test_not_if_there_is_nothing_to_pack(tmp_path: Path) -> None:
    assert packed_share(write_tiny_llama(tmp_path / "floats.gguf"), Settings()) == 0


def test_not_without_memory_for_all_of_it(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "available_memory_bytes", lambda: 1 << 20)
    assert packed_share(quantised, Settings()) == 0


def test_not_if_most_of_it_is_experts(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "experts.gguf", weights="q8_0", experts=32)
    assert sum(describe(path).matrix_bytes.values()) < describe(path).tensor_bytes / 2
    assert packed_share(path, Settings(expert_memory_bytes="off")) == 0


def test_the_dense_part_is_packed_if_experts_are_paged(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "experts.gguf", weights="q8_0", experts=32)
    dense = 1 - describe(path).expert_bytes / describe(path).tensor_bytes
    assert 0 < packed_share(path, Settings()) < dense
