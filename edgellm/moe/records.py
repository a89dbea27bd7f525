"""Where each expert's matrices are in an expert pack (edgellm/models/packs.py): one rule for reading and writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.backend.narrow import can_narrow, narrow_size
from edgellm.models.gguf import TensorInfo
from edgellm.models.packs import MATRIX_ALIGNMENT, RECORD_ALIGNMENT, STACKED_EXPERTS, block_of

MULTIPLICATION_ORDER = ("gate_up", "up", "gate", "down")
"""The order in which llama.cpp multiplies by an expert's matrices."""


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one block's experts, whose tensors stand in the order of multiplication."""

    tensors: tuple[TensorInfo, ...]
    offsets: npt.NDArray[np.int64]  # (tensors, experts): bytes from the first record to each matrix
    widths: npt.NDArray[np.uint8]  # (tensors, experts): bits that each matrix is narrowed to; 0: none
    n_bytes: int  # of all records


def place_of(tensor: TensorInfo) -> tuple[int, int]:
    """(block, place in the order of multiplication) of a stacked tensor. Raises ValueError for another."""
    match = STACKED_EXPERTS.fullmatch(tensor.name)
    return block_of(tensor), MULTIPLICATION_ORDER.index(match[2] if match else "")


def lay_out_records(tensors: Sequence[TensorInfo], widths: bytes) -> Records:
    """The records of a block with these stacked tensors, whose experts have `widths`, (experts,) bits.

    A width that a tensor's type cannot be narrowed to leaves its matrices as they are.
    """
    ordered = tuple(sorted(tensors, key=place_of))
    offsets = np.zeros((len(ordered), len(widths)), np.int64)
    narrowed = np.zeros((len(ordered), len(widths)), np.uint8)
    at = 0
    for expert, width in enumerate(widths):
        at = _aligned(at, RECORD_ALIGNMENT)
        for number, tensor in enumerate(ordered):
            columns, rows, experts = tensor.dims
            at = _aligned(at, MATRIX_ALIGNMENT)
            offsets[number, expert] = at
            if width and can_narrow(tensor.type.code, width):
                narrowed[number, expert] = width
                at += narrow_size(tensor.type.code, columns, rows, width)
            else:
                at += tensor.n_bytes // experts
    return Records(ordered, offsets, narrowed, _aligned(at, RECORD_ALIGNMENT))


def _aligned(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
