"""The routers of a MoE model, as its file has them: what look-ahead applies a layer early (kernels/lookahead.h)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.models.gguf import GGUFHeader, TensorInfo
from edgellm.moe.layout import ExpertLayout

Floats = npt.NDArray[np.float32]

_SIGMOID = 2  # LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID
_NONE: Floats = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class Router:
    """logits = weights @ input + bias; probabilities by softmax or sigmoid; the choice is that of the largest
    probabilities + selection_bias. Arrays of no size: there is none, or it is of a type that is not read here."""

    weights: Floats  # (experts, width)
    bias: Floats  # (experts,)
    selection_bias: Floats  # (experts,)
    sigmoid: bool


def read_routers(layout: ExpertLayout) -> tuple[Router, ...]:
    """(layers,): the layers' routers. Raises OSError."""
    first = layout.headers[0]
    function = first.metadata.get(f"{first.metadata.get('general.architecture')}.expert_gating_func")
    places = {tensor.name: (header, tensor) for header in layout.headers for tensor in header.tensors}
    return tuple(_router(places, block, layout.experts, function == _SIGMOID) for block in layout.blocks)


def router_width(routers: tuple[Router, ...]) -> int:
    """The width of their input; 0 if none can be used or they differ."""
    widths = {router.weights.shape[1] for router in routers if router.weights.size}
    return widths.pop() if len(widths) == 1 else 0


def _router(places: Mapping[str, tuple[GGUFHeader, TensorInfo]], block: int, experts: int, sigmoid: bool) -> Router:
    weights = _read(places.get(f"blk.{block}.ffn_gate_inp.weight"))
    return Router(
        weights=weights if weights.ndim == 2 and weights.shape[0] == experts else _NONE,
        bias=_read(places.get(f"blk.{block}.ffn_gate_inp.bias")),
        selection_bias=_read(places.get(f"blk.{block}.exp_probs_b.bias") or places.get(f"blk.{block}.exp_probs_b")),
        sigmoid=sigmoid,
    )


def _read(place: tuple[GGUFHeader, TensorInfo] | None) -> Floats:
    """The tensor in NumPy's order, the row length last; of no size if its type is not a plain float."""
    if place is None:
        return _NONE
    header, tensor = place
    with header.path.open("rb") as file:
        file.seek(header.data_offset + tensor.offset)
        data = file.read(tensor.n_bytes)
    if len(data) < tensor.n_bytes:
        raise OSError(f"{header.path.name} ends before {tensor.name}")
    shape = tuple(reversed(tensor.dims))
    match tensor.type.name:
        case "F32":
            return np.frombuffer(data, np.float32).reshape(shape)
        case "F16":
            return np.frombuffer(data, np.float16).astype(np.float32).reshape(shape)
        case "BF16":
            return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        case _:
            return _NONE
