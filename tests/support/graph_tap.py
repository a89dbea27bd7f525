"""Copies values out of llama.cpp's compute graph while it runs: hidden states, router logits, chosen experts.

For tests and for scripts that look into a model; Python is called for every node, so it is no way to serve.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.backend.context import EvalCallback
from edgellm.backend.host import Tensor

_TYPES: dict[int, type[np.generic]] = {0: np.float32, 26: np.int32}  # enum ggml_type


_Callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(Tensor), ctypes.c_bool, ctypes.c_void_p)


class GraphTap:
    """Collects a copy of every node whose name without its layer ("ffn_moe_topk-3") is among `nodes`.

    Make the context with `callback`, and keep the tap as long as the context.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = frozenset(nodes)
        self._seen: dict[str, list[npt.NDArray[Any]]] = defaultdict(list)
        self._function = _Callback(self._on_node)
        address = ctypes.cast(self._function, ctypes.c_void_p).value
        self.callback = EvalCallback(address or 0)

    def take(self) -> dict[str, npt.NDArray[Any]]:
        """Node's full name -> its values since the last call, (rows, values of a row), rows of a batch in order."""
        taken = {name: np.concatenate(parts) for name, parts in self._seen.items()}
        self._seen.clear()
        return taken

    def _on_node(self, node: Any, ask: bool, _user_data: Any) -> bool:
        tensor = node.contents
        name = tensor.name.decode()
        if name.rpartition("-")[0] not in self._nodes:
            return not ask
        if not ask:
            self._seen[name].append(_copy(tensor))
        return True


def _copy(tensor: Any) -> npt.NDArray[Any]:
    """(rows, ne[0]) of a CPU tensor with contiguous rows of at most two dimensions."""
    dtype = np.dtype(_TYPES[tensor.type])
    columns, rows, stride = int(tensor.ne[0]), int(tensor.ne[1]), int(tensor.nb[1])
    size = stride * (rows - 1) + columns * dtype.itemsize
    raw = memoryview((ctypes.c_char * size).from_address(tensor.data))
    return np.ndarray((rows, columns), dtype, raw, strides=(stride, dtype.itemsize)).copy()
