"""Narrow weights: quantised matrices stored with fewer bits than their type has (kernels/narrow.h).

Types are ggml's numbers; matrices are arrays of bytes, (bytes,), as they stand in a GGUF file. After EdgeMoE
(arXiv 2308.14352). All functions raise ValueError for a type, shape or size that does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgellm import _kernels
from edgellm.models.ggml_types import GGML_TYPES

Bytes = npt.NDArray[np.uint8]


def code_bits(type: int) -> int:
    """Bits of the type's codes; 0 for a type that cannot be narrowed."""
    return _kernels.code_bits(type)


def can_narrow(type: int, bits: int) -> bool:
    """Whether matrices of the type can be stored with `bits` bits a code: 2 to 6, and fewer than it has."""
    return _kernels.can_narrow(type, bits)


def narrow_size(type: int, columns: int, rows: int, bits: int) -> int:
    """Bytes of such a matrix, narrowed."""
    return _kernels.narrow_size(type, columns, rows, bits)


def narrow(type: int, columns: int, rows: int, bits: int, source: Bytes) -> Bytes:
    """The matrix narrowed, with the table of codes that suits it best, (narrow_size,)."""
    stored = np.empty(narrow_size(type, columns, rows, bits), np.uint8)
    _kernels.narrow(type, columns, rows, bits, source, stored)
    return stored


def narrow_errors(type: int, columns: int, rows: int, widths: Sequence[int], source: Bytes) -> tuple[float, ...]:
    """(widths,): what narrowing to each width does to the weights, as squared error over squared norm."""
    return tuple(_kernels.narrow_errors(type, columns, rows, list(widths), source))


def wideners() -> list[str]:
    """Names of the kernels that widen on this processor, the fastest first."""
    return _kernels.wideners()


def widen(type: int, columns: int, rows: int, bits: int, stored: Bytes, *, kernels: str | None = None) -> Bytes:
    """What `narrow` gave, expanded into its type, (bytes,); `kernels` None: the fastest."""
    row_bytes = columns // GGML_TYPES[type].block_elements * GGML_TYPES[type].block_bytes if type in GGML_TYPES else 0
    source = np.empty(max(0, rows * row_bytes), np.uint8)
    _kernels.widen(type, columns, rows, bits, stored, source, kernels or wideners()[0])
    return source
