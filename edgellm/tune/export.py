"""A trained adapter as a GGUF file that llama.cpp loads."""

from __future__ import annotations

import io
import math
from pathlib import Path

from edgellm.models.files import write_atomic
from edgellm.models.ggml_types import GGML_TYPES
from edgellm.models.gguf import read_header
from edgellm.models.gguf_write import NewTensor, Numbers, write_header
from edgellm.tune.lora import Lora

_F32 = GGML_TYPES[0]


def export_adapter(lora: Lora, base: Path, path: Path, *, name: str = "") -> None:
    """Writes the adapter of `base`, a GGUF model, to `path`, whole or not at all. Raises OSError.

    llama.cpp scales by alpha / rank, so a rank-stabilised adapter is written with alpha * sqrt(rank). Rows of B are
    those of the file's matrices, on which the trainer computes: there is nothing to permute.
    """
    config = lora.config
    alpha = config.alpha * (math.sqrt(config.rank) if config.rank_stabilised else 1.0)
    tensors = {
        f"{site.name}.{suffix}": tensor.detach().float().contiguous().numpy()
        for site, pair in lora.pairs.items()
        for suffix, tensor in zip(("lora_a", "lora_b"), pair, strict=True)
    }
    header = read_header(base)
    keys: dict[str, Numbers | tuple[str, ...] | str] = {
        "general.type": "adapter",
        "general.architecture": lora.architecture.name,
        "adapter.type": "lora",
        "adapter.lora.alpha": Numbers("float32", alpha),
    }
    if name:
        keys["general.name"] = name
    new = [NewTensor(tensor, data.shape[::-1], _F32) for tensor, data in tensors.items()]
    target = io.BytesIO()
    places = write_header(target, header, new, drop=header.places, add=keys, alignment=32)
    for place, data in zip(places, tensors.values(), strict=True):
        target.seek(place)
        target.write(data.astype("<f4", copy=False).tobytes())
    # Readers want the last tensor's padding too.
    write_atomic(path, target.getvalue().ljust(-(-target.tell() // 32) * 32, b"\0"))
