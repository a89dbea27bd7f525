"""Writes random mixtures of experts of any size, tensor by tensor: for work on reading experts, not on their text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from moe.random_blocks import BLOCK_TYPES, random_blocks
from tests.support.gguf_writer import add_bpe, vocabulary

ROUTER_STD = 2.0  # of its logits
_ATTENTION = 0.5  # random attention is an average of all tokens: more of it, and deep layers read the same for each
Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class RandomShape:
    """Sizes in elements; `kind` is the type of the attention's and the experts' matrices.

    `skew` is the share of what a layer reads that is the same for every token: 0 makes all experts equally likely.
    """

    architecture: str  # "qwen3moe" or "olmoe"
    layers: int
    experts: int
    experts_used: int
    width: int
    expert_width: int
    heads: int
    kv_heads: int
    head_width: int
    kind: str
    skew: float = 0.25

    def __post_init__(self) -> None:
        """Raises ValueError for what llama.cpp or the type would refuse."""
        whole = BLOCK_TYPES[self.kind].elements
        if any(size % whole for size in (self.width, self.expert_width, self.heads * self.head_width)):
            raise ValueError(
                f"the widths of the model, its experts and its heads together must be multiples of {whole}"
            )
        if not 1 <= self.experts_used <= self.experts or self.heads % self.kv_heads:
            raise ValueError("a token uses 1 to all of the experts, and heads are a multiple of key-value heads")
        if self.architecture == "olmoe" and (self.kv_heads, self.head_width * self.heads) != (self.heads, self.width):
            raise ValueError("olmoe has as many key-value heads as heads, and together they are as wide as the model")
        if not 0 <= self.skew < 1:
            raise ValueError("skew must be at least 0 and below 1")

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert: its gate, up and down matrices."""
        block = BLOCK_TYPES[self.kind]
        return 3 * self.width * self.expert_width // block.elements * block.size_bytes


PRESETS: dict[str, RandomShape] = {
    "small": RandomShape("qwen3moe", 14, 32, 4, 1024, 512, 8, 4, 128, "Q4_K"),
    "olmoe": RandomShape("olmoe", 16, 64, 8, 2048, 1024, 16, 16, 128, "Q4_K"),
    "qwen3-30b": RandomShape("qwen3moe", 48, 128, 8, 2048, 768, 32, 4, 128, "Q4_K"),
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[np.random.Generator], Array]


def write_random_moe(path: Path, shape: RandomShape, seed: int, progress: Callable[[str], None]) -> None:
    """Writes the file; memory holds one tensor at a time. The same arguments always give the same bytes.

    `progress` gets a line for each layer.
    """
    out = gguf.GGUFWriter(str(path), shape.architecture)
    _add_metadata(out, shape)
    tensors = list(_tensors(shape))
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(tensor.shape))
        if kind == gguf.GGMLQuantizationType.F32:
            out.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), 4 * count)
        else:  # the writer wants the shape in bytes
            rows = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
            out.add_tensor_info(tensor.name, rows, np.dtype(np.uint8), count // block * size, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    for number, tensor in enumerate(tensors):
        random = np.random.Generator(np.random.SFC64([seed, number]))
        out.write_tensor_data(tensor.make(random))
        if tensor.name.endswith("ffn_down_exps.weight"):
            progress(tensor.name.removesuffix(".ffn_down_exps.weight"))
    out.close()


def _add_metadata(out: gguf.GGUFWriter, shape: RandomShape) -> None:
    out.add_name(f"Random {shape.architecture}, {shape.layers} layers of {shape.experts} experts, {shape.kind}")
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    out.add_block_count(shape.layers)
    out.add_context_length(32_768)
    out.add_embedding_length(shape.width)
    out.add_feed_forward_length(shape.expert_width)
    out.add_expert_feed_forward_length(shape.expert_width)
    out.add_head_count(shape.heads)
    out.add_head_count_kv(shape.kv_heads)
    out.add_key_length(shape.head_width)
    out.add_value_length(shape.head_width)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_dimension_count(shape.head_width)
    out.add_rope_freq_base(10_000.0)
    out.add_expert_count(shape.experts)
    out.add_expert_used_count(shape.experts_used)
    out.add_vocab_size(add_bpe(out))


def _tensors(shape: RandomShape) -> Iterator[_Tensor]:
    tokens, width = len(vocabulary()[0]), shape.width
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    yield _Tensor("token_embd.weight", (tokens, width), "F32", functools.partial(_embedding, shape))
    yield _normal("output.weight", (tokens, width), 3.0)  # logits of standard deviation 3
    yield _ones("output_norm.weight", width)
    for block in (f"blk.{layer}" for layer in range(shape.layers)):
        yield _ones(f"{block}.attn_norm.weight", width)
        yield _matrix(f"{block}.attn_q.weight", (queries, width), shape)
        yield _matrix(f"{block}.attn_k.weight", (keys, width), shape)
        yield _matrix(f"{block}.attn_v.weight", (keys, width), shape)
        yield _matrix(f"{block}.attn_output.weight", (width, queries), shape, _ATTENTION)
        whole = shape.architecture == "olmoe"
        yield _ones(f"{block}.attn_q_norm.weight", queries if whole else shape.head_width)
        yield _ones(f"{block}.attn_k_norm.weight", keys if whole else shape.head_width)
        yield _ones(f"{block}.ffn_norm.weight", width)
        yield _normal(f"{block}.ffn_gate_inp.weight", (shape.experts, width), ROUTER_STD)
        yield _matrix(f"{block}.ffn_gate_exps.weight", (shape.experts, shape.expert_width, width), shape)
        yield _matrix(f"{block}.ffn_up_exps.weight", (shape.experts, shape.expert_width, width), shape)
        yield _matrix(f"{block}.ffn_down_exps.weight", (shape.experts, width, shape.expert_width), shape)


def _embedding(shape: RandomShape, random: np.random.Generator) -> Array:
    """(tokens, width) of variance 1, `skew` of it common to all tokens."""
    own = random.standard_normal((len(vocabulary()[0]), shape.width), np.float32)
    common = random.standard_normal(shape.width, np.float32)
    return (np.sqrt(1 - shape.skew) * own + np.sqrt(shape.skew) * common).astype(np.float32)


def _matrix(name: str, size: tuple[int, ...], shape: RandomShape, scale: float = 1.0) -> _Tensor:
    std = scale * size[-1] ** -0.5
    return _Tensor(name, size, shape.kind, lambda random: random_blocks(random, shape.kind, size, std))


def _normal(name: str, size: tuple[int, ...], scale: float) -> _Tensor:
    factor = np.float32(scale / size[-1] ** 0.5)
    return _Tensor(name, size, "F32", lambda random: random.standard_normal(size, np.float32) * factor)


def _ones(name: str, size: int) -> _Tensor:
    return _Tensor(name, (size,), "F32", lambda random: np.ones(size, np.float32))
