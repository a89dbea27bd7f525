"""Quantised weights, against the gguf package's own."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from edgellm.backend.quantise import QUANTISED, quantise
from edgellm.models.ggml_types import GGML_TYPES


@pytest.mark.parametrize("name", sorted(QUANTISED))
def test_blocks_are_as_near_as_those_of_the_gguf_package(name: str) -> None:
    rows = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
    found = quantise(QUANTISED[name], rows)
    assert found.shape == (7, 96 // 32 * QUANTISED[name].block_bytes)
    ours = gguf.quants.dequantize(found, kind)
    assert np.abs(ours - rows).mean() <= 1.02 * np.abs(theirs - rows).mean()


def test_rows_that_are_no_whole_blocks() -> None:
    with pytest.raises(ValueError, match="no rows of Q8_0"):
        quantise(GGML_TYPES[8], np.zeros((2, 40), np.float32))
    with pytest.raises(ValueError, match="no rows of Q8_0"):
        quantise(GGML_TYPES[8], np.zeros(64, np.float32))
