"""Quantises GGUF files with llama.cpp, for tests of formats that the gguf package does not write."""

from __future__ import annotations

import ctypes
from pathlib import Path

from edgellm.backend.library import lib
from edgellm.models.ggml_types import FILE_TYPES

_FILE_TYPES = {name: code for code, name in FILE_TYPES.items()}


def quantise(source: Path, target: Path, kind: str) -> Path:
    """Writes `source`, a file of f32 tensors, with every matrix as `kind` ("Q4_K") to `target`."""
    low = lib()
    params = low.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[kind if kind in _FILE_TYPES else f"{kind}_S"]
    params.pure = True
    params.nthread = 1
    status = low.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama.cpp could not quantise {source}")
    return target
