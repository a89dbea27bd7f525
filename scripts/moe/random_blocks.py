"""Random quantised weights, made block by block without quantising anything: random digits under a fixed scale.

Layouts: ggml-common.h. Every block of a tensor has the same scales, chosen so that its weights have the mean 0 (Q4_0,
Q5_0 and Q8_0: half a step below) and the standard deviation that is asked for; the digits are random bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BlockType:
    """One type: `fixed(std)` gives what of a block is not random, offset -> bytes."""

    elements: int
    size_bytes: int
    fixed: Callable[[float], dict[int, bytes]]


def random_blocks(random: np.random.Generator, kind: str, shape: tuple[int, ...], std: float) -> Bytes:
    """Weights of `shape`, (..., in), as (..., bytes of a row). Raises ValueError if rows are not whole blocks."""
    block = BLOCK_TYPES[kind]
    if shape[-1] % block.elements:
        raise ValueError(f"rows of {kind} are multiples of {block.elements} long, not {shape[-1]}")
    row_bytes = shape[-1] // block.elements * block.size_bytes
    size = int(np.prod(shape[:-1])) * row_bytes
    data = random.integers(0, 1 << 64, (size + 7) // 8, np.uint64).view(np.uint8)[:size]
    blocks = data.reshape(-1, block.size_bytes)
    for offset, values in block.fixed(std).items():
        blocks[:, offset : offset + len(values)] = np.frombuffer(values, np.uint8)
    return data.reshape(*shape[:-1], row_bytes)


def _half(value: float) -> bytes:
    return np.float16(value).tobytes()


def _spread(levels: int) -> float:
    """Standard deviation of 0 .. levels - 1, all equally likely."""
    return float(np.sqrt((levels**2 - 1) / 12))


def _k_quant(levels: int, offset: int = 0) -> Callable[[float], dict[int, bytes]]:
    """Q4_K, Q5_K: d * 32 * digit - dmin * 32; 32 is the scale and the minimum of each of the eight parts, packed."""
    packed = bytes([32 | 2 << 6] * 8 + [0] * 4)  # four low bits of the last four are 0, their two high ones stand here

    def fixed(std: float) -> dict[int, bytes]:
        step = std / (32 * _spread(levels))
        return {offset: _half(step) + _half(step * (levels - 1) / 2) + packed}

    return fixed


def _q2_k(std: float) -> dict[int, bytes]:
    step = std / (8 * _spread(4))
    return {0: bytes([8 | 8 << 4] * 16), 80: _half(step) + _half(1.5 * step)}


def _mxfp4(std: float) -> dict[int, bytes]:
    """The exponent nearest to what is asked for; digits stand for 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    return {0: bytes([127 + round(float(np.log2(std / 2.926)))])}


BLOCK_TYPES: dict[str, BlockType] = {
    "Q2_K": BlockType(256, 84, _q2_k),
    "Q4_K": BlockType(256, 144, _k_quant(16)),
    "Q5_K": BlockType(256, 176, _k_quant(32)),
    "Q6_K": BlockType(256, 210, lambda std: {192: bytes([32] * 16) + _half(std / (32 * _spread(64)))}),
    "Q4_0": BlockType(32, 18, lambda std: {0: _half(std / _spread(16))}),
    "Q4_1": BlockType(32, 20, lambda std: {0: _half(std / _spread(16)) + _half(-7.5 * std / _spread(16))}),
    "Q5_0": BlockType(32, 22, lambda std: {0: _half(std / _spread(32))}),
    "Q8_0": BlockType(32, 34, lambda std: {0: _half(std / _spread(256))}),
    "MXFP4": BlockType(32, 17, _mxfp4),
}
"""By ggml's name."""
