"""An adapter worked into the weights of its model: a step then costs what it costs without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from edgellm.backend.dequantise import dequantise
from edgellm.backend.quantise import QUANTISED, quantise
from edgellm.errors import AdapterError, ModelUnsupportedError
from edgellm.models.files import publish, temporary_beside
from edgellm.models.ggml_types import GGMLType
from edgellm.models.gguf import GGUFHeader, TensorInfo, read_header
from edgellm.models.gguf_write import NewTensor, write_header

Floats = npt.NDArray[np.float32]

KIND = QUANTISED["Q8_0"]
"""What matrices are written as. Coarser types round away what was learned: of an adapter with which SmolLM2-135M had
0.60 of its drafts accepted (0.46 without), 0.61 was left in Q8_0, 0.55 in Q5_1 and 0.47 in Q4_1, its own type."""


def merge_adapter(model: Path, adapter: Path, merged: Path, kind: GGMLType = KIND, *, threads: int = 1) -> None:
    """Writes to `merged`, whole or not at all, the model of which each matrix W with A and B in the adapter is
    W + alpha/rank B A, as `kind`; all else byte for byte.

    Raises AdapterError for an adapter of another model, ModelUnsupportedError for a matrix that `kind` has no rows for
    and for a model in several files, OSError.
    """
    base = _File(model)
    if base.header.split_count > 1:
        raise ModelUnsupportedError(f"{model.name}: an adapter cannot be merged into a model in several files")
    delta = _Delta(adapter)
    if not delta.names or not delta.names <= base.tensors.keys():
        raise AdapterError(f"adapter {adapter.name} is of another model")
    new = [NewTensor(i.name, i.dims, kind if i.name in delta.names else i.type) for i in base.header.tensors]
    for tensor in new:
        if tensor.name in delta.names and tensor.dims[0] % kind.block_elements:
            raise ModelUnsupportedError(f"{model.name}: {tensor.name} has no rows of {kind.name}")

    def weights(info: TensorInfo) -> npt.NDArray[np.uint8]:
        if info.name not in delta.names:
            return base.raw(info)
        return quantise(kind, delta.added_to(base.floats(info, threads=threads), info.name))

    with temporary_beside(merged) as temporary:
        with temporary.open("wb") as file:
            _write(file, base.header, new, weights)
        publish(temporary, merged)


def _write(
    file: BinaryIO, header: GGUFHeader, new: list[NewTensor], weights: Callable[[TensorInfo], npt.NDArray[np.uint8]]
) -> None:
    for place, info in zip(write_header(file, header, new), header.tensors, strict=True):
        file.seek(place)
        file.write(weights(info).tobytes())
    file.write(bytes(-file.tell() % header.alignment))  # readers want the last tensor's padding, too


class _File:
    """A GGUF file and its numbers."""

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)
        self.tensors = {info.name: info for info in self.header.tensors}
        self._mapped = np.memmap(path, np.uint8, "r")

    def raw(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        start = self.header.data_offset + info.offset
        return np.ascontiguousarray(self._mapped[start : start + info.n_bytes])

    def floats(self, info: TensorInfo, *, threads: int = 1) -> Floats:
        """(rows, columns)."""
        found = np.empty(info.dims[::-1], np.float32)
        dequantise(info.type, self.raw(info), found.reshape(-1), threads=threads)
        return found


class _Delta:
    """What an adapter adds to matrices."""

    def __init__(self, path: Path) -> None:
        self._file = _File(path)
        alpha = self._file.header.metadata.get("adapter.lora.alpha")
        parts = {part: {n.removesuffix(part) for n in self._file.tensors if n.endswith(part)} for part in ("_a", "_b")}
        if not isinstance(alpha, float) or parts["_a"] != parts["_b"]:
            raise AdapterError(f"adapter {path.name} cannot be merged: it is no LoRA adapter")
        self._path, self._alpha = path, alpha
        self.names = frozenset(name.removesuffix(".lora") for name in parts["_a"])

    def added_to(self, weights: Floats, name: str) -> Floats:
        """`weights`, (rows, columns), with what the adapter adds to the tensor `name`."""
        tensors = self._file.tensors
        a, b = (self._file.floats(tensors[f"{name}.lora_{part}"]) for part in "ab")
        rows, columns = weights.shape
        if a.ndim != 2 or a.shape[1] != columns or b.shape != (rows, len(a)):
            raise AdapterError(f"adapter {self._path.name}: its tensors for {name} do not fit the model")
        weights += (self._alpha / len(a)) * (b @ a)
        return weights
