"""What would end the process inside llama.cpp is refused before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgellm.errors import InvalidModelFileError
from edgellm.models.gguf import read_header
from edgellm.models.sanity import check_metadata, check_tensor


@pytest.mark.parametrize(
    ("name", "n_dims", "kind", "words"),
    [
        ("blk.0.attn_q.weight", 2, "I32", "weights cannot have"),
        ("blk.0.attn_q.weight.lora_a", 2, "F64", "weights cannot have"),
        ("output_norm.weight", 1, "F16", "norms must be F32"),
        ("blk.0.attn_q.weight", 2, "Q4_K", None),
        ("rope_freqs.weight", 1, "F32", None),
        ("blk.0.attn_norm.weight", 1, "F32", None),
    ],
)
def test_types_of_tensors(name: str, n_dims: int, kind: str, words: str | None) -> None:
    fault = check_tensor(name, n_dims, kind)
    assert fault is None if words is None else words in str(fault)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "refused"),
    [(4, 2, False), (4, 3, True), ((4, 4), (2, 3), True), ((4, 4), (2, 0), False), (4, None, False)],
)
def test_heads_must_divide(heads: Any, kv_heads: Any, refused: bool) -> None:
    metadata = {"general.architecture": "x", "x.block_count": 2, "x.attention.head_count": heads}
    if kv_heads is not None:
        metadata["x.attention.head_count_kv"] = kv_heads
    fault = check_metadata(metadata, {})
    assert (fault is not None and "cannot share" in fault) is refused


def test_a_file_with_such_a_tensor_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "bad.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidModelFileError, match="weights cannot have"):
        read_header(tmp_path / "bad.gguf")
