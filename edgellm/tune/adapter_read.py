"""An adapter that was exported, to be trained further: what export.py writes, read back."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch

from edgellm.errors import AdapterError, ConfigError, ModelError
from edgellm.models.gguf import GGUFHeader, TensorInfo, read_header
from edgellm.tune.architecture import Architecture
from edgellm.tune.lora import Lora, LoraConfig
from edgellm.tune.scheme import Site

_NAME = re.compile(r"blk\.(\d{1,5})\.([a-z_]+)\.weight\.(lora_[ab])")


def read_adapter(path: Path, architecture: Architecture) -> Lora:
    """The adapter in a GGUF file, for a model of that architecture. Raises AdapterError if it does not fit, OSError."""
    try:
        header = read_header(path)
        tensors = {_place(info): info for info in header.tensors}
        sites = {site for site, _ in tensors}
        rank = {info.dims[0] if part == "lora_b" else info.dims[1] for (_, part), info in tensors.items()}
        alpha = header.metadata.get("adapter.lora.alpha")
        if header.metadata.get("general.architecture") != architecture.name or len(tensors) != 2 * len(sites):
            raise AdapterError(f"adapter {path.name} is of another model")
        if len(rank) != 1 or not isinstance(alpha, float) or not math.isfinite(alpha):
            raise AdapterError(
                f"adapter {path.name} cannot be trained further: its rank or its alpha is not one number"
            )
        lora = Lora(architecture, sites, LoraConfig(rank.pop(), alpha))
    except (ModelError, ConfigError) as error:
        raise AdapterError(f"adapter {path.name} cannot be trained further: {error}") from None
    mapped = np.memmap(path, np.uint8, "r")
    with torch.no_grad():
        for site, pair in lora.pairs.items():
            for part, mine in zip(("lora_a", "lora_b"), pair, strict=True):
                mine.copy_(_values(header, tensors[site, part], mapped, tuple(mine.shape)))
    return lora


def _place(info: TensorInfo) -> tuple[Site, str]:
    match = _NAME.fullmatch(info.name)
    if match is None or info.type.name != "F32" or len(info.dims) != 2:
        raise AdapterError(f"an adapter with the tensor {info.name!r} cannot be trained further")
    return Site(int(match[1]), match[2]), match[3]


def _values(header: GGUFHeader, info: TensorInfo, mapped: np.memmap, shape: tuple[int, ...]) -> torch.Tensor:
    if info.dims[::-1] != shape:
        raise AdapterError(f"the adapter's tensor {info.name} does not fit the model")
    start = header.data_offset + info.offset
    values = np.array(mapped[start : start + info.n_bytes]).view("<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise AdapterError(f"the adapter's tensor {info.name} holds what are no numbers")
    return torch.from_numpy(values).reshape(shape)
