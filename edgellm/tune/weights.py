"""A base model's weights: quantised in memory as in the file, expanded whenever they are used."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgellm.backend.dequantise import Bytes, dequantise
from edgellm.models.gguf import TensorInfo, read_header
from edgellm.models.split import split_headers
from edgellm.tune.architecture import Architecture, read_architecture

_CPU_FLAGS = Path("/proc/cpuinfo")
_FAST_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, ARM


def compute_type(flags: Path = _CPU_FLAGS) -> torch.dtype:
    """bfloat16 where the processor multiplies it faster than float32, else float32."""
    if not sys.platform.startswith("linux") or not flags.is_file():
        return torch.float32
    return torch.bfloat16 if _FAST_BF16 & set(flags.read_text().split()) else torch.float32


class Matrix:
    """A frozen weight of shape (rows, columns) = (out, in) that stays as it is in the file."""

    def __init__(self, info: TensorInfo, data: Bytes, threads: int) -> None:
        """`data`: (bytes,), mapped."""
        self.name = info.name
        self.columns, self.rows = info.dims
        self._kind = info.type
        self._data = data.reshape(self.rows, -1)  # (rows, bytes of a row)
        self._threads = threads

    @property
    def stored_bytes(self) -> int:
        """What the matrix takes in the file."""
        return self._data.nbytes

    def expand(self, dtype: torch.dtype, start: int = 0, end: int | None = None) -> Tensor:
        """Rows [start, end) as (rows, columns), float32 or bfloat16."""
        return self._expand(self._data[start:end], dtype)

    def look_up(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows whose numbers are in `rows`, (n,), as (n, columns)."""
        return self._expand(np.ascontiguousarray(self._data[rows.numpy()]), dtype)

    def _expand(self, data: Bytes, dtype: torch.dtype) -> Tensor:
        expanded = torch.empty(len(data), self.columns, dtype=dtype)
        if len(data):
            # numpy knows no bfloat16: its bits are written as int16.
            bits = expanded if dtype == torch.float32 else expanded.view(torch.int16)
            dequantise(self._kind, data.reshape(-1), bits.numpy().reshape(-1), threads=self._threads)
        return expanded


class BaseWeights:
    """A GGUF model's tensors by name, mapped read-only: memory is shared with whoever serves the file."""

    def __init__(self, path: Path | str, *, threads: int = 1) -> None:
        """`path` is the model's first file. Raises as `read_header`, `split_headers` and `read_architecture` do."""
        headers = split_headers(read_header(path))
        self.architecture: Architecture = read_architecture(headers)
        self._threads = threads
        self._places: dict[str, tuple[TensorInfo, Bytes]] = {}
        for header in headers:
            mapped = np.memmap(header.path, np.uint8, "r")
            for info in header.tensors:
                start = header.data_offset + info.offset
                self._places[info.name] = (info, mapped[start : start + info.n_bytes])

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def matrix(self, name: str) -> Matrix:
        """A two-dimensional weight. Raises KeyError."""
        info, data = self._places[name]
        return Matrix(info, data, self._threads)

    def vector(self, name: str) -> Tensor | None:
        """A norm or bias as float32, (elements,); None if the file has none of the name."""
        if name not in self._places:
            return None
        info, data = self._places[name]
        values = torch.empty(info.elements)
        dequantise(info.type, data, values.numpy())
        return values
