"""A small decoder of which every weight is trained, in float32.

Computes what llama.cpp computes (src/models there) for the architectures that can be cut. Matrices are whole in memory
as floats: the model has a few layers.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from edgellm.backend.quantise import quantise
from edgellm.errors import StorageError
from edgellm.models.files import publish, temporary_beside
from edgellm.models.ggml_types import FILE_TYPES, GGML_TYPES, GGMLType
from edgellm.models.gguf import read_header
from edgellm.models.gguf_write import NewTensor, Numbers, write_header
from edgellm.tune.attention import Block, attention, blocks_of
from edgellm.tune.ops import Angles, gated, grouped, ungrouped
from edgellm.tune.prefix_tree import Packed
from edgellm.tune.weights import BaseWeights

_F32 = GGML_TYPES[0]
_FILE_TYPES = {name: code for code, name in FILE_TYPES.items()}
_FACTORS = "rope_freqs.weight"  # is not trained


class Net:
    """A decoder's weights, by their names in the file, and its forward pass."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        """Begins with the weights of the GGUF file `path`. Raises as BaseWeights does."""
        base = BaseWeights(path, threads=threads)
        self.shape, self._path = base.architecture, path
        self.weights: dict[str, Tensor] = {}
        for info in read_header(path).tensors:
            name = info.name
            matrix = len(info.dims) == 2
            found: Tensor | None = base.matrix(name).expand(torch.float32) if matrix else base.vector(name)
            if found is not None:
                self.weights[name] = found.requires_grad_(name != _FACTORS)
        self._head = self.weights.get("output.weight", self.weights["token_embd.weight"])

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [weight for weight in self.weights.values() if weight.requires_grad]

    def logits(self, packed: Packed, places: Tensor) -> Tensor:
        """(places, vocabulary) of the tokens at `places` of the pack, (places,), int64."""
        stream = F.embedding(packed.tokens, self.weights["token_embd.weight"]) * self.shape.embedding_scale
        angles, blocks = self._angles(packed.positions), blocks_of(packed.segments)
        for layer in range(self.shape.layers):
            stream = self._attend(stream, f"blk.{layer}", angles, blocks)
            stream = self._feed_forward(stream, f"blk.{layer}")
        return F.linear(self._norm(stream[places], "output_norm"), self._head)

    def _attend(self, stream: Tensor, block: str, angles: Angles, blocks: tuple[Block, ...]) -> Tensor:
        shape, count = self.shape, len(stream)
        x = self._norm(stream, f"{block}.attn_norm")
        q = self._linear(x, f"{block}.attn_q").view(count, shape.heads, shape.head_width)
        k = self._linear(x, f"{block}.attn_k").view(count, shape.kv_heads, shape.head_width)
        v = self._linear(x, f"{block}.attn_v").view(count, shape.kv_heads, shape.head_width)
        if f"{block}.attn_q_norm.weight" in self.weights:
            q, k = self._norm(q, f"{block}.attn_q_norm"), self._norm(k, f"{block}.attn_k_norm")
        share = shape.heads // shape.kv_heads
        q = grouped(q, angles, share=share, interleaved=shape.rope_interleaved)
        k = grouped(k, angles, interleaved=shape.rope_interleaved)
        mixed = attention(q, k, grouped(v), blocks, share=share, scale=shape.score_scale)
        return stream + self._linear(ungrouped(mixed, share=share), f"{block}.attn_output")

    def _feed_forward(self, stream: Tensor, block: str) -> Tensor:
        x = self._norm(stream, f"{block}.ffn_norm")
        gate, up = self._linear(x, f"{block}.ffn_gate"), self._linear(x, f"{block}.ffn_up")
        return stream + self._linear(gated(gate, up, gelu=self.shape.gelu), f"{block}.ffn_down")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.rms_norm(x, (len(weight),), weight, self.shape.norm_epsilon)

    def _angles(self, positions: Tensor) -> Angles:
        pairs = self.shape.rope_width // 2
        frequencies = self.shape.rope_base ** (torch.arange(pairs, dtype=torch.float64) * -2 / self.shape.rope_width)
        if _FACTORS in self.weights:
            frequencies = frequencies / self.weights[_FACTORS]
        angles = positions[:, None] * frequencies
        return angles.cos().float(), angles.sin().float()

    def save(self, path: Path, kind: GGMLType, *, name: str) -> None:
        """Writes the model as a GGUF file called `name`, whole or not at all: matrices as `kind`, the rest as float32.

        Raises StorageError.
        """
        header = read_header(self._path)
        new, parts = [], []
        for info in header.tensors:
            data = self.weights[info.name].detach().numpy()
            matrix = data.ndim == 2
            new.append(NewTensor(info.name, info.dims, kind if matrix else _F32))
            parts.append((quantise(kind, data) if matrix else data.astype("<f4", copy=False)).tobytes())
        keys: dict[str, Numbers | tuple[str, ...] | str] = {"general.name": name}
        keys["general.file_type"] = Numbers("uint32", _FILE_TYPES[kind.name])
        try:
            with temporary_beside(path) as temporary:
                with temporary.open("wb") as file:
                    for place, part in zip(write_header(file, header, new, add=keys), parts, strict=True):
                        file.seek(place)
                        file.write(part)
                    file.write(bytes(-file.tell() % header.alignment))  # readers want the last tensor's padding, too
                publish(temporary, path)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from None
