"""Packed weights: edgellm's own matrix multiplication inside llama.cpp's CPU backend.

llama.cpp multiplies several of the common weight formats a row at a time. `edgellm._kernels` (kernels/packed.h)
rearranges them when a model is loaded and multiplies sixteen rows at once; docs/benchmarks.md has the figures. It
hooks into llama.cpp's C++ classes, whose layout no public header promises: so what is relied on is checked here against
the library that is loaded, and without a match, or on a processor without the instructions, llama.cpp does as it would.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator
from typing import Any

from edgellm import _kernels
from edgellm.backend.library import lib

_log = logging.getLogger(__name__)

_CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
_F32, _I32, _Q4_1 = 0, 26, 3
_API_VERSION = 2  # GGML_BACKEND_API_VERSION: the layout of buffers and buffer types


class _Tensor(ctypes.Structure):
    """`ggml_tensor`, as kernels/ggml_abi.h has it."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@functools.cache
def packing_kernels() -> str | None:
    """The name of the kernels that packed weights will be multiplied with; None where weights are not packed.

    The first call, which must come before the first model is loaded, installs them.
    """
    if not (available := _kernels.kernels()):
        _log.info("weights are not packed: this processor has no instructions for it")
        return None
    try:
        functions, numbers = _host(_kernels.types())
    except (OSError, AttributeError, _UnknownLibraryError) as error:
        _log.warning("weights are not packed: llama.cpp is not the library that was expected (%s)", error)
        return None
    _kernels.install(functions, numbers, available[0])
    return available[0]


def packable_types() -> frozenset[str]:
    """Tensor types that will be packed, as GGUF files name them: "Q4_K"; none where weights are not packed."""
    return frozenset(_kernels.types()) if packing_kernels() else frozenset()


@contextlib.contextmanager
def packing(on: bool) -> Iterator[None]:
    """While this is entered, models that this thread loads are packed, or not."""
    if packing_kernels() is None:
        yield
        return
    _kernels.set_packing(on)
    try:
        yield
    finally:
        _kernels.set_packing(False)


class _UnknownLibraryError(Exception):
    """The loaded llama.cpp is not laid out as `kernels/ggml_abi.h` says."""


def _host(types: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Addresses of the functions that are called, and numbers of operations and types."""
    ggml = lib()._lib  # libllama's handle also finds what is in the libraries of ggml that it is linked with
    ggml.ggml_type_name.restype = ctypes.c_char_p
    for name, number in types.items():
        _expect(ggml.ggml_type_name(number).lower() == name.lower().encode(), f"tensor type {name}")
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    device = ggml.ggml_backend_dev_by_type(_CPU_DEVICE)
    ggml.ggml_backend_dev_backend_reg.restype = ctypes.c_void_p
    backend = ggml.ggml_backend_dev_backend_reg(ctypes.c_void_p(device))
    _expect(ctypes.c_int.from_address(backend).value == _API_VERSION, "the version of the backend interface")
    functions = {
        "extra_buffer_types": _address(ggml._Z39ggml_backend_cpu_get_extra_buffer_typesv),
        "buffer_init": _address(ggml.ggml_backend_buffer_init),
        "barrier": _address(ggml.ggml_barrier),
        "chunk_set": _address(ggml.ggml_threadpool_chunk_set),
        "chunk_add": _address(ggml.ggml_threadpool_chunk_add),
        "device": device,
    }
    return functions, _numbers(ggml)


def _numbers(ggml: Any) -> dict[str, int]:
    """Makes tensors with ggml itself, and reads them as `_Tensor`."""
    tensor = ctypes.POINTER(_Tensor)
    ggml.ggml_init.argtypes, ggml.ggml_init.restype = (_InitParams,), ctypes.c_void_p
    ggml.ggml_free.argtypes = (ctypes.c_void_p,)
    ggml.ggml_tensor_overhead.restype = ctypes.c_size_t
    ggml.ggml_new_tensor_2d.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    for function in (ggml.ggml_mul_mat, ggml.ggml_get_rows):
        function.argtypes = (ctypes.c_void_p, tensor, tensor)
    ggml.ggml_set_name.argtypes = (tensor, ctypes.c_char_p)
    for function in (ggml.ggml_new_tensor_2d, ggml.ggml_mul_mat, ggml.ggml_get_rows, ggml.ggml_set_name):
        function.restype = tensor
    context = ggml.ggml_init(_InitParams(16 * ggml.ggml_tensor_overhead(), None, True))
    try:
        weight = ggml.ggml_set_name(ggml.ggml_new_tensor_2d(context, _Q4_1, 64, 48), b"weight")
        rows = ggml.ggml_new_tensor_2d(context, _F32, 64, 5)
        ids = ggml.ggml_new_tensor_2d(context, _I32, 7, 1)
        product, looked_up = ggml.ggml_mul_mat(context, weight, rows), ggml.ggml_get_rows(context, weight, ids)
        at = ctypes.addressof
        w, p, g = weight.contents, product.contents, looked_up.contents
        _expect(at(rows.contents) - at(w) == ggml.ggml_tensor_overhead(), "the size of a tensor")
        _expect(ggml.ggml_tensor_overhead() == ctypes.sizeof(_Tensor) + 32, "the size of a tensor")
        _expect((w.type, *w.ne, *w.nb) == (_Q4_1, 64, 48, 1, 1, 20, 40, 1920, 1920), "the shape of a tensor")
        _expect(w.name == b"weight" and not w.data and not w.view_src, "the name of a tensor")
        _expect((p.type, *p.ne, p.src[0], p.src[1]) == (_F32, 48, 5, 1, 1, at(w), at(rows.contents)), "the product")
        _expect((g.type, *g.ne, g.src[0], g.src[1]) == (_F32, 64, 7, 1, 1, at(w), at(ids.contents)), "the look-up")
        return {"MUL_MAT": p.op, "GET_ROWS": g.op, "f32": _F32, "i32": _I32}
    finally:
        ggml.ggml_free(context)


def _expect(fact: bool, what: str) -> None:
    if not fact:
        raise _UnknownLibraryError(f"{what} differs")


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)
