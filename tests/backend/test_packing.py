"""Packed weights against the formats' definitions and against llama.cpp, on random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm import _kernels
from edgellm.backend import packing
from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Adapter, Model
from edgellm.models.ggml_types import GGML_TYPES
from tests.support.quantise import quantise
from tests.support.tiny_gguf import write_tiny_llama, write_tiny_lora

TYPES = _kernels.types()
KERNELS = _kernels.kernels()
_HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2)}

pytestmark = pytest.mark.skipif(not KERNELS, reason="this processor has no instructions for packed weights")


def random_matrix(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes of a type, (rows, bytes of a row), whose scales are sane halves of either sign."""
    kind = GGML_TYPES[TYPES[name]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, columns // kind.block_elements, kind.block_bytes), np.uint8)
    for offset in _HALVES.get(name, (208,)):
        scale = rng.uniform(0.001, 0.1, blocks.shape[:2]) * rng.choice([-1, 1], blocks.shape[:2])
        blocks[:, :, offset : offset + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def floats(name: str, matrix: np.ndarray) -> np.ndarray:
    """What the format's definition says, by the gguf package."""
    return np.asarray(gguf.quants.dequantize(matrix, gguf.GGMLQuantizationType(TYPES[name])), np.float32)


def packed(name: str, matrix: np.ndarray, columns: int) -> np.ndarray:
    return _kernels.pack(TYPES[name], columns, len(matrix), matrix.reshape(-1))


def rounded(rows: np.ndarray) -> np.ndarray:
    """Activations as the kernels see them: signed bytes with one scale for each 32, in double precision."""
    blocks = rows.reshape(len(rows), -1, 32)
    largest = np.abs(blocks).max(2, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    scale = (largest / np.float32(127)).astype(np.float64)
    return (np.rint(blocks * inverse) * scale).reshape(rows.shape)


def test_every_type_has_the_number_that_ggml_gives_it() -> None:
    assert {GGML_TYPES[number].name for number in TYPES.values()} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_packing_loses_nothing(name: str) -> None:
    matrix = random_matrix(name, 48, 512)
    unpacked = _kernels.unpack(TYPES[name], 512, 48, packed(name, matrix, 512))
    assert np.array_equal(unpacked, floats(name, matrix))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=12)
@given(n=st.integers(1, 40), groups=st.integers(1, 3), blocks=st.integers(1, 3), seed=st.integers(0, 1000))
def test_products_are_those_of_the_definition(
    name: str, kernels: str, n: int, groups: int, blocks: int, seed: int
) -> None:
    columns, rows = blocks * 256, groups * 16
    matrix = random_matrix(name, rows, columns, seed)
    inputs = np.random.default_rng(seed).standard_normal((n, columns), np.float32)
    result = _kernels.multiply(TYPES[name], rows, packed(name, matrix, columns), inputs, kernels)
    weights = floats(name, matrix).astype(np.float64)
    expected = rounded(inputs) @ weights.T
    magnitude = np.abs(rounded(inputs)) @ np.abs(weights).T
    assert np.all(np.abs(result - expected) <= 1e-5 * magnitude)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", TYPES)
def test_a_row_is_the_same_whatever_stands_beside_it(name: str, kernels: str) -> None:
    inputs = np.random.default_rng(1).standard_normal((37, 512), np.float32)
    weights = packed(name, random_matrix(name, 32, 512), 512)
    together = _kernels.multiply(TYPES[name], 32, weights, inputs, kernels)
    for count in range(1, 37):
        assert np.array_equal(_kernels.multiply(TYPES[name], 32, weights, inputs[:count], kernels), together[:count])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_stays_in_its_row(kernels: str, bad: float) -> None:
    inputs = np.random.default_rng(2).standard_normal((5, 256), np.float32)
    inputs[3, 77] = bad
    inputs[1] = 0
    weights = packed("Q4_1", random_matrix("Q4_1", 16, 256), 256)
    result = _kernels.multiply(TYPES["Q4_1"], 16, weights, inputs, kernels)
    assert np.all(np.isnan(result[3]))
    assert np.all(result[1] == 0)
    assert np.all(np.isfinite(result[[0, 2, 4]]))


def test_the_largest_weights_and_activations_do_not_overflow() -> None:
    matrix = np.full((16, 34 * 8), 0x80, np.uint8).reshape(16, 8, 34)  # every weight -128
    matrix[:, :, :2] = np.full((16, 8), 1, np.float16)[..., None].view(np.uint8)
    weights = packed("Q8_0", matrix.reshape(16, -1), 256)
    inputs = np.full((3, 256), -127, np.float32)
    for kernels in KERNELS:
        result = _kernels.multiply(TYPES["Q8_0"], 16, weights, inputs, kernels)
        assert np.all(result == 128 * 127 * 256)


@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [("Q4_1", 33, 16), ("Q4_1", 32, 15), ("Q4_K", 128, 16), ("Q4_1", 0, 16), ("Q4_1", 32, 0)],
)
def test_other_shapes_are_refused(name: str, columns: int, rows: int) -> None:
    assert not _kernels.can_pack(TYPES[name], columns, rows)
    with pytest.raises(ValueError, match="type and shape"):
        _kernels.pack(TYPES[name], columns, rows, np.zeros(0, np.uint8))


def test_other_types_and_sizes_are_refused() -> None:
    assert not _kernels.can_pack(0, 64, 64)
    with pytest.raises(ValueError, match="another size"):
        _kernels.pack(TYPES["Q4_1"], 32, 16, np.zeros(319, np.uint8))
    with pytest.raises(ValueError, match="another size"):
        _kernels.multiply(TYPES["Q4_1"], 16, np.zeros(319, np.uint8), np.zeros((1, 32), np.float32), KERNELS[0])
    with pytest.raises(ValueError, match="no kernels named"):
        _kernels.multiply(TYPES["Q4_1"], 16, np.zeros(320, np.uint8), np.zeros((1, 32), np.float32), "MMX")


# --- in llama.cpp -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("packing") / "plain.gguf", width=256, heads=4, vocab=512, seed=3)


def logits(path: Path, *, packed: bool, adapter: Path | None = None, threads: int = 2) -> np.ndarray:
    """Logits after each of 40 tokens, read in steps of several sizes, (40, vocabulary)."""
    model = Model(path, mapped=not packed, packed=packed)
    context = Context(model, ContextParams(256, sequences=2, batch_tokens=64, outputs=64, threads=threads))
    loaded = Adapter(model, adapter) if adapter else None
    if loaded:
        context.set_adapters([(loaded, 1.0)])
    batch, rows = Batch(64), []
    tokens = [(7 * i) % 500 for i in range(40)]
    for start, count in ((0, 1), (1, 2), (3, 5), (8, 30), (38, 2)):
        batch.clear()
        batch.extend(tokens[start : start + count], start, 0, outputs=count)
        context.decode(batch)
        rows += [context.logits(i).copy() for i in range(count)]
    context.close()
    if loaded:
        loaded.close()
    model.close()
    return np.stack(rows)


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for the rounding of activations, which the two do in blocks of different sizes."""
    return bool(np.sqrt(np.mean((a - b) ** 2)) < 0.05 * np.sqrt(np.mean(b**2)))


@pytest.mark.parametrize("name", TYPES)
def test_a_packed_model_computes_what_the_model_computes(name: str, plain_path: Path, tmp_path: Path) -> None:
    path = quantise(plain_path, tmp_path / "model.gguf", name)
    before = _kernels.packed_bytes()
    assert _close(logits(path, packed=True), logits(path, packed=False))
    assert _kernels.packed_bytes() == before


def test_the_weights_are_really_packed_and_freed(plain_path: Path, tmp_path: Path) -> None:
    path = quantise(plain_path, tmp_path / "model.gguf", "Q4_1")
    before = _kernels.packed_bytes()
    unpacked = Model(path)
    assert _kernels.packed_bytes() == before
    model = Model(path, mapped=False, packed=True)
    assert _kernels.packed_bytes() > before + path.stat().st_size // 2
    model.close()
    unpacked.close()
    assert _kernels.packed_bytes() == before


def test_the_number_of_threads_changes_nothing(plain_path: Path, tmp_path: Path) -> None:
    path = quantise(plain_path, tmp_path / "model.gguf", "Q4_1")
    one = logits(path, packed=True, threads=1)
    assert np.array_equal(logits(path, packed=True, threads=3), one)


def test_adapters_work_on_packed_weights(plain_path: Path, tmp_path: Path) -> None:
    path = quantise(plain_path, tmp_path / "model.gguf", "Q4_1")
    adapter = write_tiny_lora(tmp_path / "adapter.gguf", plain_path, seed=5, magnitude=0.3)
    with_adapter = logits(path, packed=True, adapter=adapter)
    assert _close(with_adapter, logits(path, packed=False, adapter=adapter))
    assert not _close(with_adapter, logits(path, packed=True))


_UNKNOWN_LIBRARY = """
import logging, sys
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
from edgellm.backend import host, packing
from edgellm.backend.library import lib
lib()
host._API_VERSION = 99
print(packing.packing_kernels(), packing.packable_types())
from pathlib import Path
from edgellm import _kernels
from edgellm.backend.model import Model
model = Model(Path(sys.argv[1]), packed=True)
print(_kernels.packed_bytes())
"""


def test_another_library_is_left_alone(plain_path: Path, tmp_path: Path) -> None:
    path = quantise(plain_path, tmp_path / "model.gguf", "Q4_1")
    done = subprocess.run([sys.executable, "-c", _UNKNOWN_LIBRARY, path], capture_output=True, text=True, check=True)
    assert "the version of the backend interface differs" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["None frozenset()", "0"]


_SLOWER_KERNELS = """
import sys
from pathlib import Path
import numpy as np
from edgellm import _kernels
names = _kernels.kernels()
_kernels.kernels = lambda: names[int(sys.argv[2]):]
from tests.backend.test_packing import logits
np.save(sys.argv[3], logits(Path(sys.argv[1]), packed=True))
"""


def test_all_kernels_compute_the_same_model(plain_path: Path, tmp_path: Path) -> None:
    path = quantise(plain_path, tmp_path / "model.gguf", "Q4_1")
    results = []
    for index in range(len(KERNELS)):
        saved = tmp_path / f"{index}.npy"
        command = [sys.executable, "-c", _SLOWER_KERNELS, path, str(index), saved]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
        results.append(np.load(saved))
    assert all(np.allclose(result, results[0], rtol=1e-3, atol=1e-3) for result in results)


def test_this_library_is_the_expected_one() -> None:
    assert packing.packing_kernels() == KERNELS[0]
    assert packing.packable_types() == set(TYPES)
