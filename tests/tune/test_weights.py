"""Quantised matrices that are expanded when used."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from edgellm.tune.weights import BaseWeights, compute_type  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama  # noqa: E402


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> BaseWeights:
    return BaseWeights(write_tiny_llama(tmp_path_factory.mktemp("weights") / "m.gguf", weights="q8_0"), threads=2)


def test_parts_of_a_matrix(weights: BaseWeights) -> None:
    matrix = weights.matrix("token_embd.weight")
    whole = matrix.expand(torch.float32)
    assert whole.shape == (matrix.rows, matrix.columns)
    assert matrix.stored_bytes == whole.numel() // 32 * 34
    assert torch.equal(matrix.expand(torch.float32, 5, 9), whole[5:9])
    assert torch.equal(matrix.look_up(torch.tensor([7, 3, 7])), whole[[7, 3, 7]])
    assert torch.equal(matrix.expand(torch.bfloat16), whole.bfloat16())


def test_names(weights: BaseWeights) -> None:
    assert "blk.0.attn_q.weight" in weights
    assert "blk.9.attn_q.weight" not in weights
    assert weights.vector("blk.0.attn_q.bias") is None
    norm = weights.vector("output_norm.weight")
    assert norm is not None
    assert torch.equal(norm, torch.ones(64))


def test_half_floats_only_where_they_are_fast(tmp_path: Path) -> None:
    flags = tmp_path / "cpuinfo"
    assert compute_type(flags) == torch.float32
    flags.write_text("flags\t\t: fpu avx512f avx512_bf16 avx512_vbmi2")
    assert compute_type(flags) in (torch.bfloat16, torch.float32)  # only Linux says
    flags.write_text("flags\t\t: fpu avx512f")
    assert compute_type(flags) == torch.float32
