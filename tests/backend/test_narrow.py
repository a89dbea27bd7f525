"""Narrow weights against the formats' definitions, and their tables against every other table."""

from __future__ import annotations

import itertools
import mmap
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.backend import narrow
from edgellm.models.ggml_types import GGML_TYPES

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4")
CODES = {kind.name: kind.code for kind in GGML_TYPES.values()}
BITS = dict(zip(NAMES, (4, 4, 5, 5, 8, 4, 5, 6, 4, 4), strict=True))
CASES = [(name, bits) for name in NAMES for bits in range(2, min(7, BITS[name]))]

# Where a block's parts that are kept lie, and what makes its weights the numbers that its codes stand for.
_ONE = np.array([1], np.float16).tobytes()
_NO = bytes(2)
_NEUTRAL = {
    "Q4_0": _ONE,
    "Q4_1": _ONE + _NO,
    "Q5_0": _ONE,
    "Q5_1": _ONE + _NO,
    "Q8_0": _ONE,
    "Q4_K": _ONE + _NO + bytes([1] * 4 + [0] * 4 + [1] * 4),
    "Q5_K": _ONE + _NO + bytes([1] * 4 + [0] * 4 + [1] * 4),
    "Q6_K": bytes([1] * 16) + _ONE,
    "IQ4_NL": _ONE,
    "MXFP4": bytes([128]),  # ggml's numbers are twice those of the format
}


def kept(name: str) -> slice:
    size = len(_NEUTRAL[name])
    return slice(192, 210) if name == "Q6_K" else slice(0, size)


def blocks_of(name: str, matrix: Bytes) -> Bytes:
    """(blocks, bytes), a view."""
    return matrix.reshape(-1, GGML_TYPES[CODES[name]].block_bytes)


def floats(name: str, matrix: Bytes) -> Floats:
    """(blocks, columns of a block): weights as the format's definition has them, by the gguf package."""
    found = gguf.quants.dequantize(blocks_of(name, matrix), gguf.GGMLQuantizationType(CODES[name]))
    return np.asarray(found, np.float64)


def values(name: str, matrix: Bytes) -> Floats:
    """(blocks, columns of a block): the numbers that the codes stand for."""
    blocks = blocks_of(name, matrix).copy()
    blocks[:, kept(name)] = np.frombuffer(_NEUTRAL[name], np.uint8)
    return floats(name, blocks.reshape(-1))


def all_values(name: str) -> list[float]:
    """The numbers that a type's codes stand for."""
    if name == "IQ4_NL":
        return [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    if name == "MXFP4":
        return [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12]
    first = {"Q4_0": -8, "Q5_0": -16, "Q6_K": -32, "Q8_0": -128}.get(name, 0)
    return [first + code for code in range(1 << BITS[name])]


def random_matrix(name: str, rows: int, columns: int, seed: int = 0) -> Bytes:
    """Random codes, some oftener than others; scales that differ, some of them negative or zero."""
    kind = GGML_TYPES[CODES[name]]
    rng = np.random.default_rng(seed)
    count = rows * columns // kind.block_elements
    blocks, others = rng.integers(0, 256, (2, count, kind.block_bytes), np.uint8)
    blocks = np.where(rng.random(blocks.shape) < 0.5, blocks, blocks & others)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(118, 130, count)
        return blocks.reshape(-1)
    for offset in {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(name, (0,)):
        scale = rng.uniform(0.001, 0.1, count) * rng.choice([-1, 0, 1], count, p=[0.4, 0.1, 0.5])
        blocks[:, offset : offset + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(-1)


def trip(name: str, rows: int, columns: int, bits: int, matrix: Bytes, kernels: str | None = None) -> Bytes:
    """Narrowed and widened."""
    stored = narrow.narrow(CODES[name], columns, rows, bits, matrix)
    return narrow.widen(CODES[name], columns, rows, bits, stored, kernels=kernels)


def weights_of_values(name: str, matrix: Bytes) -> dict[float, float]:
    """value -> sum of the squared scales of the codes that stand for it."""
    numbers, real = values(name, matrix), floats(name, matrix)
    other = blocks_of(name, matrix).copy()  # all codes zero: the difference shows the scale, whatever is added
    keep = np.zeros(other.shape[1], bool)
    keep[kept(name)] = True
    other[:, ~keep] = 0
    zero = values(name, other.reshape(-1))
    numbers, real = numbers - zero, real - floats(name, other.reshape(-1))
    scale = np.divide(real, numbers, out=np.zeros_like(real), where=numbers != 0)
    each = 16 if name == "Q6_K" else 32
    scale = np.abs(scale).reshape(-1, each).max(1, keepdims=True)
    found: dict[float, float] = {}
    for value, weight in zip(values(name, matrix).ravel(), np.repeat(scale**2, each, 1).ravel(), strict=True):
        found[value] = found.get(value, 0.0) + weight
    return found


def cost(weights: dict[float, float], tables: Floats) -> Floats:
    """(tables,): the squared error with each of (tables, entries)."""
    total = np.zeros(len(tables))
    for value, weight in weights.items():
        total += weight * ((tables - value) ** 2).min(1)
    return total


def error(name: str, before: Bytes, after: Bytes) -> float:
    """Squared error over squared norm, the slow way."""
    real = floats(name, before)
    return float(((floats(name, after) - real) ** 2).sum() / (real**2).sum())


@pytest.mark.parametrize("name", NAMES)
def test_the_types_and_their_widths(name: str) -> None:
    code = CODES[name]
    assert narrow.code_bits(code) == BITS[name]
    assert [bits for bits in range(-1, 10) if narrow.can_narrow(code, bits)] == list(range(2, min(7, BITS[name])))


@pytest.mark.parametrize("name", ["F32", "F16", "Q2_K", "Q8_K", "IQ4_XS", "NVFP4"])
def test_other_types_are_not_narrowed(name: str) -> None:
    assert narrow.code_bits(CODES[name]) == 0
    assert not narrow.can_narrow(CODES[name], 2)
    with pytest.raises(ValueError, match="so many bits"):
        narrow.narrow_size(CODES[name], 256, 1, 2)


@pytest.mark.parametrize(("name", "bits"), CASES)
@settings(max_examples=10)
@given(rows=st.integers(1, 9), blocks=st.integers(1, 9), seed=st.integers(0, 1000))
def test_each_code_becomes_the_closest_in_the_table(name: str, bits: int, rows: int, blocks: int, seed: int) -> None:
    columns = blocks * GGML_TYPES[CODES[name]].block_elements
    matrix = random_matrix(name, rows, columns, seed)
    stored = narrow.narrow(CODES[name], columns, rows, bits, matrix)
    groups = -(-rows * columns // 256)
    assert stored.size == 64 + groups * 32 * bits + rows * blocks * len(_NEUTRAL[name])
    assert not stored[1 << bits : 64].any()

    wide = narrow.widen(CODES[name], columns, rows, bits, stored)
    assert np.array_equal(blocks_of(name, wide)[:, kept(name)], blocks_of(name, matrix)[:, kept(name)])
    before, after = values(name, matrix), values(name, wide)
    used = np.unique(after)
    assert len(used) <= 1 << bits
    assert np.array_equal(np.abs(after - before), np.abs(before[..., None] - used).min(2))
    for kernels in narrow.wideners():
        assert np.array_equal(narrow.widen(CODES[name], columns, rows, bits, stored, kernels=kernels), wide)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_any_stored_bytes_give_the_same_with_all_kernels(name: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    stored = rng.integers(0, 256, narrow.narrow_size(CODES[name], 768, 3, bits), np.uint8)
    first, *others = [narrow.widen(CODES[name], 768, 3, bits, stored, kernels=kernels) for kernels in narrow.wideners()]
    for other in others:
        assert np.array_equal(other, first)


@pytest.mark.parametrize(("name", "bits"), [(name, bits) for name, bits in CASES if BITS[name] == 4])
@pytest.mark.parametrize("seed", range(3))
def test_no_table_is_better(name: str, bits: int, seed: int) -> None:
    matrix = random_matrix(name, 2, 512, seed)
    weights = weights_of_values(name, matrix)
    tables = np.array(list(itertools.combinations(all_values(name), 1 << bits)))
    real = floats(name, matrix)
    least = cost(weights, tables).min() / (real**2).sum()
    (found,) = narrow.narrow_errors(CODES[name], 512, 2, [bits], matrix)
    assert found == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_table_is_no_worse_than_a_uniform_one_or_its_neighbours(name: str, bits: int) -> None:
    matrix = random_matrix(name, 4, 512, 5)
    weights, among = weights_of_values(name, matrix), np.array(all_values(name))
    norm = (floats(name, matrix) ** 2).sum()
    (found,) = narrow.narrow_errors(CODES[name], 512, 4, [bits], matrix)
    uniform = among[np.linspace(0, len(among) - 1, 1 << bits).round().astype(int)]
    assert found <= cost(weights, uniform[None])[0] / norm * (1 + 1e-9)

    codes = narrow.narrow(CODES[name], 512, 4, bits, matrix)
    own = np.unique(values(name, narrow.widen(CODES[name], 512, 4, bits, codes)))
    moved = [np.where(np.arange(len(own)) == at, value, own) for at in range(len(own)) for value in among]
    assert found <= cost(weights, np.array(moved)).min() / norm * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_what_the_weights_say_and_falls_with_more_bits(name: str) -> None:
    matrix = random_matrix(name, 8, 512, 1)
    widths = range(2, min(7, BITS[name]))
    errors = narrow.narrow_errors(CODES[name], 512, 8, widths, matrix)
    for bits, found in zip(widths, errors, strict=True):
        assert found == pytest.approx(error(name, matrix, trip(name, 8, 512, bits, matrix)), rel=1e-5)
    assert list(errors) == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)
    assert errors[-1] > 0


def test_four_bits_of_q8_0_are_about_as_good_as_q4_0() -> None:
    weights = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    eight = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0).reshape(-1)
    four = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q4_0).reshape(-1)
    rounded = ((floats("Q4_0", four).ravel() - weights.ravel()) ** 2).sum() / (weights**2).sum()
    (found,) = narrow.narrow_errors(CODES["Q8_0"], 512, 64, [4], eight)
    assert 0.6 * rounded < found < 1.2 * rounded


@pytest.mark.parametrize(("name", "bits"), CASES)
@pytest.mark.parametrize("fill", [0x00, 0x11, 0x77, 0xFF])
def test_a_matrix_of_few_codes_loses_nothing(name: str, bits: int, fill: int) -> None:
    matrix = random_matrix(name, 8, 256, 3)
    blocks = blocks_of(name, matrix).copy()
    keep = blocks[:, kept(name)].copy()
    blocks[:] = fill
    blocks[:, kept(name)] = keep
    same = blocks.reshape(-1)
    assert np.array_equal(values(name, trip(name, 8, 256, bits, same)), values(name, same))
    assert narrow.narrow_errors(CODES[name], 256, 8, [bits], same) == (0.0,)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_matrix_of_zeros_has_no_error(name: str, bits: int) -> None:
    if name == "MXFP4":
        pytest.skip("its scales are never zero")
    matrix = random_matrix(name, 2, 256, 4)
    blocks = blocks_of(name, matrix)
    blocks[:, kept(name)] = 0
    assert narrow.narrow_errors(CODES[name], 256, 2, [bits], matrix) == (0.0,)
    assert not floats(name, trip(name, 2, 256, bits, matrix)).any()


def test_scales_that_are_no_numbers_do_not_spoil_the_table() -> None:
    matrix = random_matrix("Q8_0", 4, 256, 6)
    blocks = blocks_of("Q8_0", matrix)
    sound = narrow.narrow(CODES["Q8_0"], 256, 3, 4, matrix[: 3 * 8 * 34])
    for bad in (np.inf, -np.inf, np.nan):
        blocks[24:, :2] = np.array([bad], np.float16).view(np.uint8)
        assert np.array_equal(narrow.narrow(CODES["Q8_0"], 256, 4, 4, matrix)[:64], sound[:64])
        (found,) = narrow.narrow_errors(CODES["Q8_0"], 256, 4, [4], matrix)
        assert found == narrow.narrow_errors(CODES["Q8_0"], 256, 3, [4], matrix[: 3 * 8 * 34])[0]


def test_the_largest_scales_do_not_overflow() -> None:
    matrix = random_matrix("MXFP4", 1, 256, 7)
    blocks_of("MXFP4", matrix)[:, 0] = 255
    (found,) = narrow.narrow_errors(CODES["MXFP4"], 256, 1, [2], matrix)
    assert 0 < found < 1


@pytest.mark.parametrize(("columns", "rows"), [(33, 1), (32, 0), (0, 1), (-32, 1), (32, -1), (1 << 60, 1 << 60)])
def test_other_shapes_are_refused(columns: int, rows: int) -> None:
    with pytest.raises(ValueError, match="type and shape"):
        narrow.narrow_size(CODES["Q8_0"], columns, rows, 4)
    nothing = np.zeros(0, np.uint8)
    with pytest.raises(ValueError, match="type and shape"):
        narrow.narrow_errors(CODES["Q8_0"], columns, rows, [4], nothing)


def test_other_sizes_and_kernels_are_refused() -> None:
    code, matrix = CODES["Q8_0"], random_matrix("Q8_0", 2, 64)
    with pytest.raises(ValueError, match="another size"):
        narrow.narrow(code, 64, 2, 4, matrix[1:])
    stored = narrow.narrow(code, 64, 2, 4, matrix)
    with pytest.raises(ValueError, match="another size"):
        narrow.widen(code, 64, 2, 4, stored[:-1])
    with pytest.raises(ValueError, match="another size"):
        narrow.widen(code, 64, 2, 5, stored)
    with pytest.raises(ValueError, match="so many bits"):
        narrow.widen(code, 64, 2, 8, stored)
    with pytest.raises(ValueError, match="no kernels named"):
        narrow.widen(code, 64, 2, 4, stored, kernels="MMX")


def test_a_mapped_file_is_narrowed_where_it_lies(tmp_path: Path) -> None:
    matrix = random_matrix("Q4_K", 2, 256)
    (tmp_path / "matrix").write_bytes(matrix.tobytes())
    with (tmp_path / "matrix").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        source = np.frombuffer(mapped, np.uint8)
        assert np.array_equal(narrow.narrow(CODES["Q4_K"], 256, 2, 3, source), narrow.narrow(12, 256, 2, 3, matrix))
        del source
