"""Floats as quantised weights, by ggml's own routine."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.backend.dequantise import Bytes
from edgellm.backend.library import lib
from edgellm.errors import BackendError
from edgellm.models.ggml_types import GGML_TYPES, GGMLType

QUANTISED = {kind.name: kind for kind in GGML_TYPES.values() if kind.name in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")}
"""What weights can be written as: the types whose blocks are short, so that rows of any width fit."""


def quantise(kind: GGMLType, rows: npt.NDArray[np.float32]) -> Bytes:
    """`rows`, (rows, columns), as (rows, bytes of a row). Raises ValueError where a row is no whole number of blocks.

    Raises BackendError if ggml writes another number of bytes than the type has.
    """
    if rows.ndim != 2 or rows.shape[1] % kind.block_elements:
        raise ValueError(f"an array of shape {rows.shape} has no rows of {kind.name}")
    rows = np.ascontiguousarray(rows, np.float32)
    n_bytes = rows.shape[1] // kind.block_elements * kind.block_bytes
    result = np.empty((len(rows), n_bytes), np.uint8)
    written = _quantise_chunk()(kind.code, rows.ctypes.data, result.ctypes.data, 0, *rows.shape, None)
    if written != result.nbytes:
        raise BackendError(f"llama.cpp wrote {written} bytes of {kind.name}, not {result.nbytes}")
    return result


@functools.cache
def _quantise_chunk() -> Any:
    """`ggml_quantize_chunk` (ggml.h): type, source, target, first element, rows, columns, importance."""
    function = lib()._lib.ggml_quantize_chunk
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes, function.restype = (
        (ctypes.c_int, pointer, pointer, whole, whole, whole, pointer),
        ctypes.c_size_t,
    )
    return function
