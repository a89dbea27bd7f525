"""Weights as floats, against the gguf package's own expansion."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgellm.backend.dequantise import dequantise
from edgellm.errors import ModelUnsupportedError
from edgellm.models.ggml_types import GGML_TYPES
from tests.support.quantise import quantise
from tests.support.tiny_gguf import write_tiny_llama

KINDS = (
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
)
NAMES = {"Q2_K": "Q2_K_S", "Q3_K": "Q3_K_M", "IQ4_XS": "IQ4_XS"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("dequantise") / "plain.gguf", layers=1, width=256)


def _halves(values: np.ndarray) -> np.ndarray:
    """bfloat16, rounded to nearest even, as int16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.int16)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_and_any_number_of_threads(plain: Path, tmp_path: Path, kind: str) -> None:
    path = quantise(plain, tmp_path / "q.gguf", kind)
    tensor = next(one for one in gguf.GGUFReader(path).tensors if one.name == "blk.0.ffn_down.weight")
    assert tensor.tensor_type.name == kind
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
    source = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1)
    floats, halves = np.empty(expected.size, np.float32), np.empty(expected.size, np.int16)
    for threads in (1, 3):
        dequantise(GGML_TYPES[tensor.tensor_type], source, floats, threads=threads)
        dequantise(GGML_TYPES[tensor.tensor_type], source, halves, threads=threads)
        assert np.allclose(floats, expected, rtol=1e-6, atol=1e-7)
        assert np.array_equal(halves, _halves(floats))
        floats.fill(0)
        halves.fill(0)


def test_floats_are_copied() -> None:
    values = np.random.default_rng(0).standard_normal(100_000, dtype=np.float32)
    floats, halves = np.empty_like(values), np.empty(values.size, np.int16)
    dequantise(GGML_TYPES[0], values.view(np.uint8), floats, threads=2)
    dequantise(GGML_TYPES[0], values.view(np.uint8), halves, threads=2)
    assert np.array_equal(floats, values)
    assert np.array_equal(halves, _halves(values))


def test_what_does_not_fit_is_refused() -> None:
    source, kind = np.zeros(18 * 4, np.uint8), GGML_TYPES[2]
    for wrong in (np.empty(127, np.float32), np.empty(128, np.float64), np.empty(256, np.float32)[::2]):
        with pytest.raises(ValueError, match=r"elements|contiguous"):
            dequantise(kind, source, wrong)
    with pytest.raises(ValueError, match="73 bytes"):
        dequantise(kind, np.zeros(73, np.uint8), np.empty(128, np.float32))
    with pytest.raises(ModelUnsupportedError, match="I32"):
        dequantise(GGML_TYPES[26], source, np.empty(18, np.float32))
