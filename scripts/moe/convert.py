"""Writes a dense qwen2 GGUF file anew as a mixture of experts of the architecture glm4moe.

glm4moe fits because its biases of queries, keys and values are optional, its rotary embedding pairs the same elements
as qwen2's, and its shared expert is added unscaled. Sigmoid gating of logits near 0, times 2, gives every chosen expert
a weight near 1: the sum over all experts is then the dense layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from moe.split import Floats, Layer, Split, SplitShape

ARCHITECTURE = "glm4moe"
EXPERTS_USED_KEY = f"{ARCHITECTURE}.expert_used_count"
_SIGMOID = gguf.ExpertGatingFuncType.SIGMOID
MOST_USED = 32
"""Experts in use: for more, llama.cpp's graph has no room with so few tensors, and it aborts the process."""
_ROUTER_SCALE = 0.01  # weights of chosen experts: 2 * sigmoid(logit / 100), within 3 % of 1
_DOWN = gguf.GGMLQuantizationType.Q8_0  # columns move, so blocks of a row do not stay whole: they are packed anew


class DenseModel:
    """The tensors of a dense qwen2 file."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the file is of another architecture."""
        self.path = path
        self.reader = gguf.GGUFReader(path)
        self.architecture = str(self._value("general.architecture"))
        if self.architecture != "qwen2":
            raise ValueError(f"{path.name} is of the architecture {self.architecture}, not qwen2")
        self.layers = int(self._value("qwen2.block_count"))
        self.width = int(self._value("qwen2.embedding_length"))
        self.neurons = int(self._value("qwen2.feed_forward_length"))
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def _value(self, key: str) -> Any:
        field = self.reader.get_field(key)
        if field is None:
            raise ValueError(f"the file lacks {key}")
        return field.contents()

    def layer(self, number: int) -> Layer:
        """The feed-forward weights of one layer, dequantised."""
        return Layer(*(self._floats(f"blk.{number}.ffn_{part}.weight") for part in ("gate", "up", "down")))

    def _floats(self, name: str) -> Floats:
        tensor = self.tensors[name]
        return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)


def check_shape(shape: SplitShape, experts_used: int, neurons: int) -> None:
    """Raises ValueError for a split that is not of `neurons`, or that llama.cpp would refuse."""
    if shape.shared + shape.experts * shape.expert_width != neurons:
        raise ValueError(f"shared neurons and experts x expert width must add up to {neurons}")
    if shape.expert_width % 32 or shape.shared % shape.expert_width or not shape.shared:
        raise ValueError("the expert width must be a multiple of 32, and the shared neurons of the expert width")
    if not 1 <= experts_used <= min(shape.experts, MOST_USED) or shape.experts < 2:
        raise ValueError(f"a token uses 1 to all of at least 2 experts, and at most {MOST_USED}")


def coarser(shape: SplitShape, splits: list[Split]) -> tuple[SplitShape, list[Split]]:
    """The same splits with so few experts, each of several, that all of them can be in use at once.

    Raises ValueError if the number of experts cannot be divided so.
    """
    for several in range(1, shape.experts // 2 + 1):
        width = several * shape.expert_width
        if shape.experts % several == 0 and shape.experts // several <= MOST_USED and shape.shared % width == 0:
            count = shape.experts // several
            joined = [
                Split(split.shared, split.experts.reshape(count, width), split.router[::several]) for split in splits
            ]
            return SplitShape(shape.shared, count, width), joined
    raise ValueError(f"{shape.experts} experts cannot be joined into at most {MOST_USED}")


def write_moe(path: Path, dense: DenseModel, splits: list[Split], shape: SplitShape, experts_used: int) -> None:
    """Writes the mixture. Attention, embeddings, gate and up rows keep their bytes; down matrices become Q8_0."""
    out = gguf.GGUFWriter(path, ARCHITECTURE)
    _copy_metadata(out, dense)
    out.add_expert_count(shape.experts)
    out.add_expert_used_count(experts_used)
    out.add_expert_feed_forward_length(shape.expert_width)
    out.add_expert_shared_count(shape.shared // shape.expert_width)
    out.add_expert_gating_func(_SIGMOID)
    out.add_expert_weights_norm(False)
    out.add_expert_weights_scale(2.0)
    out.add_leading_dense_block_count(0)
    for name, tensor in dense.tensors.items():
        if ".ffn_" not in name:
            out.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    for number, split in enumerate(splits):
        for name, data, kind in _layer_tensors(dense, number, split):
            out.add_tensor(f"blk.{number}.{name}", data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _layer_tensors(
    dense: DenseModel, number: int, split: Split
) -> Iterator[tuple[str, Any, gguf.GGMLQuantizationType]]:
    """(name within the block, data, type) of what stands for the feed-forward part of one layer."""
    plain = gguf.GGMLQuantizationType.F32
    yield "post_attention_norm.weight", dense.tensors[f"blk.{number}.ffn_norm.weight"].data, plain
    yield "ffn_gate_inp.weight", split.router * np.float32(_ROUTER_SCALE), plain
    yield "exp_probs_b.bias", np.zeros(len(split.experts), np.float32), plain
    for part in ("gate", "up"):  # a neuron is a row
        tensor = dense.tensors[f"blk.{number}.ffn_{part}.weight"]
        yield f"ffn_{part}_shexp.weight", tensor.data[split.shared], tensor.tensor_type
        yield f"ffn_{part}_exps.weight", tensor.data[split.experts], tensor.tensor_type
    down = dense.layer(number).down.T  # (neurons, width)
    yield "ffn_down_shexp.weight", gguf.quants.quantize(np.ascontiguousarray(down[split.shared].T), _DOWN), _DOWN
    experts = np.ascontiguousarray(down[split.experts].swapaxes(1, 2))  # (experts, width, expert width)
    yield "ffn_down_exps.weight", gguf.quants.quantize(experts, _DOWN), _DOWN


def _copy_metadata(out: gguf.GGUFWriter, dense: DenseModel) -> None:
    for name, field in dense.reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        key = name.replace("qwen2.", f"{ARCHITECTURE}.", 1) if name.startswith("qwen2.") else name
        kind = field.types[0]
        out.add_key_value(key, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)


def set_experts_used(path: Path, count: int) -> None:
    """Changes in place how many experts a token uses."""
    reader = gguf.GGUFReader(path, "r+")
    field = reader.get_field(EXPERTS_USED_KEY)
    if field is None:
        raise ValueError(f"{path.name} lacks {EXPERTS_USED_KEY}")
    field.parts[field.data[0]][0] = count
    reader.data.flush()
