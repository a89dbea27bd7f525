"""What edgellm's native code relies on in the loaded llama.cpp, found and checked once a process.

The native code hooks into C++ classes of ggml's CPU backend, whose layout no public header promises
(kernels/ggml_abi.h). So what is relied on is checked here against the library that is loaded; without a match nothing
is hooked in, and llama.cpp does as it would.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

from edgellm import _kernels
from edgellm.backend.library import lib

_CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
_F32, _F16, _I32, _Q4_1, _Q8_1 = 0, 1, 26, 3, 9
_API_VERSION = 2  # GGML_BACKEND_API_VERSION: the layout of buffers and buffer types


class UnknownLibraryError(Exception):
    """The loaded llama.cpp is not laid out as kernels/ggml_abi.h says."""


class Tensor(ctypes.Structure):
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


class _TypeTraits(ctypes.Structure):
    """`ggml_type_traits_cpu`."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


@functools.cache
def connect_host() -> None:
    """Tells the native code where llama.cpp's functions are. Raises UnknownLibraryError."""
    try:
        functions, numbers = _host(_kernels.types())
    except (OSError, AttributeError) as error:
        raise UnknownLibraryError(str(error)) from error
    _kernels.set_host(functions, numbers)


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
        "type_traits": _address(ggml.ggml_get_type_traits_cpu),
        "row_size": _address(ggml.ggml_row_size),
        "device": device,
    }
    _check_types(ggml)
    return functions, _numbers(ggml)


def _numbers(ggml: Any) -> dict[str, int]:
    """Makes tensors with ggml itself, and reads them as `Tensor`."""
    tensor = ctypes.POINTER(Tensor)
    ggml.ggml_init.argtypes, ggml.ggml_init.restype = (_InitParams,), ctypes.c_void_p
    ggml.ggml_free.argtypes = (ctypes.c_void_p,)
    ggml.ggml_tensor_overhead.restype = ctypes.c_size_t
    ggml.ggml_new_tensor_2d.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    for function in (ggml.ggml_mul_mat, ggml.ggml_get_rows):
        function.argtypes = (ctypes.c_void_p, tensor, tensor)
    ggml.ggml_set_name.argtypes = (tensor, ctypes.c_char_p)
    ggml.ggml_new_tensor_3d.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    ggml.ggml_mul_mat_id.argtypes = (ctypes.c_void_p, tensor, tensor, tensor)
    for function in (ggml.ggml_new_tensor_2d, ggml.ggml_mul_mat, ggml.ggml_get_rows, ggml.ggml_set_name):
        function.restype = tensor
    ggml.ggml_new_tensor_3d.restype = ggml.ggml_mul_mat_id.restype = tensor
    ggml.ggml_flash_attn_ext.argtypes = (ctypes.c_void_p, *[tensor] * 4, *[ctypes.c_float] * 3)
    ggml.ggml_flash_attn_ext.restype = tensor
    context = ggml.ggml_init(_InitParams(16 * ggml.ggml_tensor_overhead(), None, True))
    try:
        weight = ggml.ggml_set_name(ggml.ggml_new_tensor_2d(context, _Q4_1, 64, 48), b"weight")
        rows = ggml.ggml_new_tensor_2d(context, _F32, 64, 5)
        ids = ggml.ggml_new_tensor_2d(context, _I32, 7, 1)
        product, looked_up = ggml.ggml_mul_mat(context, weight, rows), ggml.ggml_get_rows(context, weight, ids)
        at = ctypes.addressof
        w, p, g = weight.contents, product.contents, looked_up.contents
        _expect(at(rows.contents) - at(w) == ggml.ggml_tensor_overhead(), "the size of a tensor")
        _expect(ggml.ggml_tensor_overhead() == ctypes.sizeof(Tensor) + 32, "the size of a tensor")
        _expect((w.type, *w.ne, *w.nb) == (_Q4_1, 64, 48, 1, 1, 20, 40, 1920, 1920), "the shape of a tensor")
        _expect(w.name == b"weight" and not w.data and not w.view_src, "the name of a tensor")
        _expect((p.type, *p.ne, p.src[0], p.src[1]) == (_F32, 48, 5, 1, 1, at(w), at(rows.contents)), "the product")
        _expect((g.type, *g.ne, g.src[0], g.src[1]) == (_F32, 64, 7, 1, 1, at(w), at(ids.contents)), "the look-up")
        stack = ggml.ggml_new_tensor_3d(context, _Q4_1, 64, 48, 6)
        tokens, chosen = ggml.ggml_new_tensor_3d(context, _F32, 64, 1, 5), ggml.ggml_new_tensor_2d(context, _I32, 2, 5)
        each = ggml.ggml_mul_mat_id(context, stack, tokens, chosen)
        e, sources = each.contents, (at(stack.contents), at(tokens.contents), at(chosen.contents))
        _expect((e.type, *e.ne, *e.src[:3]) == (_F32, 48, 2, 5, 1, *sources), "the product by experts")
        keys, values = (ggml.ggml_new_tensor_3d(context, _F16, width, 256, 2) for width in (64, 32))
        query, mask = ggml.ggml_new_tensor_3d(context, _F32, 64, 3, 4), ggml.ggml_new_tensor_2d(context, _F16, 256, 64)
        attention = ggml.ggml_flash_attn_ext(context, query, keys, values, mask, 0.5, 0.0, 0.0)
        a, read = attention.contents, (at(tensor.contents) for tensor in (query, keys, values, mask))
        _expect((a.type, *a.ne, *a.src[:5]) == (_F32, 32, 4, 3, 1, *read, None), "attention")
        _expect(bytes(a.op_params)[:12] == struct.pack("3f", 0.5, 0.0, 0.0), "the parameters of attention")
        return {
            "MUL_MAT": p.op,
            "MUL_MAT_ID": e.op,
            "GET_ROWS": g.op,
            "FLASH_ATTN_EXT": a.op,
            "f32": _F32,
            "f16": _F16,
            "i32": _I32,
        }
    finally:
        ggml.ggml_free(context)


def _check_types(ggml: Any) -> None:
    """How rows are multiplied, of a type whose activations are rounded and of one whose are not."""
    ggml.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_TypeTraits)
    ggml.ggml_row_size.argtypes, ggml.ggml_row_size.restype = (ctypes.c_int, ctypes.c_int64), ctypes.c_size_t
    for kind, rounded in ((_F32, _F32), (_Q4_1, _Q8_1)):
        traits = ggml.ggml_get_type_traits_cpu(kind).contents
        _expect(bool(traits.vec_dot) and traits.vec_dot_type == rounded, "the dot product of a type")
    _expect(ggml.ggml_row_size(_Q4_1, 64) == 40, "the size of a row")


def _expect(fact: bool, what: str) -> None:
    if not fact:
        raise UnknownLibraryError(f"{what} differs")


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)
