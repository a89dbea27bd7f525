"""Quantised weights as floats, by ggml's own routines, on several threads."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.backend.library import lib
from edgellm.backend.threads import in_shares
from edgellm.errors import BackendError, ModelUnsupportedError
from edgellm.models.ggml_types import GGML_TYPES, GGMLType

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float32] | npt.NDArray[np.int16]

_PIECE = 1 << 16  # elements that are expanded at a time: 256 KiB of floats stay in a core's cache; whole blocks
_F32 = 0
_convert = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """`ggml_type_traits` (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_elements", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantised", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float", ctypes.c_void_p),
    )


def dequantise(kind: GGMLType, source: Bytes, target: Numbers, *, threads: int = 1) -> None:
    """Expands `source`, (bytes,), into `target`, (elements,): float32, or bfloat16 as the int16 that hold its bits.

    Both lie in one piece. Raises ModelUnsupportedError for a type that has no floats, ValueError where sizes differ.
    """
    blocks, rest = divmod(source.nbytes, kind.block_bytes)
    if rest or blocks * kind.block_elements != target.size:
        raise ValueError(f"{source.nbytes} bytes of {kind.name} are not {target.size} elements")
    if not (source.flags.c_contiguous and target.flags.c_contiguous) or target.dtype not in (np.float32, np.int16):
        raise ValueError("arrays must be contiguous, and the target float32 or int16")
    convert = functools.partial(
        _expand, kind, _to_float(kind.code), source.ctypes.data, target.ctypes.data, target.dtype == np.int16
    )
    in_shares(lambda part: convert(part.start, part.stop), target.size, threads, _PIECE)


def _expand(kind: GGMLType, to_float: Any, source: int, target: int, halves: bool, start: int, end: int) -> None:
    """Elements [start, end), a piece at a time. ctypes lets go of the interpreter while ggml computes."""
    to_half = _to_half()
    scratch = (ctypes.c_float * _PIECE)() if halves and to_float is not None else None
    at = ctypes.addressof(scratch) if scratch is not None else 0
    for first in range(start, end, _PIECE):
        count = min(_PIECE, end - first)
        data = source + first // kind.block_elements * kind.block_bytes
        if not halves:
            if to_float is None:
                ctypes.memmove(target + 4 * first, data, 4 * count)
            else:
                to_float(data, target + 4 * first, count)
            continue
        if to_float is not None:
            to_float(data, at, count)
        to_half(at or data, target + 2 * first, count)


@functools.cache
def _to_float(code: int) -> Any:
    """ggml's routine for a type, None for float32 itself. Raises as `dequantise`, BackendError for another layout."""
    ggml, kind = lib()._lib, GGML_TYPES[code]
    ggml.ggml_get_type_traits.argtypes = (ctypes.c_int,)
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    traits = ggml.ggml_get_type_traits(code).contents
    found = (traits.type_name.lower(), traits.block_elements, traits.block_bytes)
    if found != (kind.name.lower().encode(), kind.block_elements, kind.block_bytes):
        raise BackendError(f"llama.cpp knows the tensor type {kind.name} otherwise than expected: {found}")
    if code == _F32:
        return None
    if not traits.to_float:
        raise ModelUnsupportedError(f"llama.cpp cannot expand weights of type {kind.name}")
    return _convert(traits.to_float)


@functools.cache
def _to_half() -> Any:
    function = lib()._lib.ggml_fp32_to_bf16_row
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), None
    return function
