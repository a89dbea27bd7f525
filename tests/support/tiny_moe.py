"""Tiny random mixtures of experts as GGUF files that llama.cpp loads and decodes, of every common architecture.

Their text is noise, but routing is real: it depends on the token, and a few dozen tokens use most of the experts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.support.gguf_writer import CHATML, WEIGHTS, Writer, add_bpe, add_general
from tests.support.moe_layers import add_layer
from tests.support.moe_traits import ARCHITECTURES, Shape, Traits, Value
from tests.support.quantise import quantise

_K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def write_tiny_moe(
    path: Path | str,
    architecture: str,
    *,
    seed: int = 0,
    layers: int | None = None,
    experts: int = 8,
    experts_used: int = 2,
    width: int | None = None,
    expert_width: int | None = None,
    weights: str = "f32",
    merged: bool = False,
    vocab: int | None = None,
    context: int = 512,
    chat_template: str | None = CHATML,
    nextn: bool = False,
) -> Path:
    """A decoder of one of ARCHITECTURES; the same arguments always give the same bytes.

    `weights` is the type of the matrices; routers, norms and biases are f32. `width` and `expert_width` are 64 if not
    given (1.5 MB in f32), 256 for the K-quants q2_k .. q6_k (3 MB), and multiples of what the type takes for a block:
    32, or 256. `layers` None is the fewest that show all the architecture has, 3 or 4: a leading dense layer is the
    first, recurrent layers are all but every third. `merged` writes ffn_gate_up_exps, where llama.cpp takes it; `nextn`
    makes the last layer one that predicts a second token, which llama.cpp leaves out of its graph (glm4moe has such).
    Raises ValueError for what does not fit together.
    """
    traits = ARCHITECTURES.get(architecture)
    if traits is None:
        raise ValueError(f"unknown architecture {architecture!r}: not one of {', '.join(ARCHITECTURES)}")
    if weights not in WEIGHTS + _K_QUANTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS + _K_QUANTS)}, not {weights!r}")
    if merged and traits.gate_up != "either":
        raise ValueError(f"{architecture} has no merged experts")
    block = {"f32": 1, "f16": 1, "bf16": 1}.get(weights, 256 if weights in _K_QUANTS else 32)
    width = width or max(64, block)
    expert_width = expert_width or max(64, block)
    if width % max(block, 32) or expert_width % block:
        raise ValueError(f"widths must be multiples of {block} for {weights}, and of 32")
    kv_heads = 4 if traits.equal_heads else 2
    if layers is not None and layers < traits.layers:
        raise ValueError(f"{architecture} needs {traits.layers} layers")
    shape = Shape(layers or traits.layers, width, 4, kv_heads, experts, experts_used, expert_width)
    if weights in WEIGHTS:
        return _write(Path(path), architecture, shape, seed, weights, merged, vocab, context, chat_template, nextn)
    with tempfile.TemporaryDirectory() as folder:  # by way of f32: the gguf package does not write K-quants
        plain = Path(folder) / "f32.gguf"
        _write(plain, architecture, shape, seed, "f32", merged, vocab, context, chat_template, nextn)
        return quantise(plain, Path(path), weights.upper())


def _write(
    path: Path,
    architecture: str,
    shape: Shape,
    seed: int,
    weights: str,
    merged: bool,
    vocab: int | None,
    context: int,
    chat_template: str | None,
    nextn: bool,
) -> Path:
    traits = ARCHITECTURES[architecture]
    file = Writer(path, architecture, seed, weights)
    add_general(file.out, f"Tiny {architecture}", weights)
    tokens = add_bpe(file.out, vocab, chat_template)
    for key, value in _metadata(shape, traits, tokens, context).items():
        _add(file, f"{architecture}.{key}", value)
    if nextn:
        _add(file, f"{architecture}.nextn_predict_layers", 1)
    file.matrix("token_embd.weight", tokens, shape.width, scale=shape.width**0.5)
    file.matrix("output.weight", tokens, shape.width, scale=3.0)  # logits of standard deviation 3
    file.norm(traits.output_norm, shape.width)
    if traits.norm_biases:
        file.uniform(f"{traits.output_norm}.bias", shape.width)
        file.uniform("output.bias", tokens)
    if traits.beside:  # gemma4: the rotary frequencies of its global layers
        file.norm("rope_freqs", shape.head // 2)
    for layer in range(shape.layers):
        add_layer(file, shape, traits, layer, merged=merged)
    if nextn:
        last = f"blk.{shape.layers - 1}.nextn"
        file.matrix(f"{last}.eh_proj.weight", shape.width, 2 * shape.width)
        for name in ("enorm", "hnorm", "shared_head_norm"):
            file.norm(f"{last}.{name}", shape.width)
    file.close()
    return path


def _metadata(shape: Shape, traits: Traits, tokens: int, context: int) -> dict[str, Value]:
    """Key without the architecture's prefix -> value."""
    values: dict[str, Value] = {
        "vocab_size": tokens,
        "context_length": context,
        "block_count": shape.layers,
        "embedding_length": shape.width,
        "feed_forward_length": shape.dense_width if traits.own_width else shape.expert_width,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.dimension_count": shape.head,
        "rope.freq_base": 10_000.0,
        "expert_count": shape.experts,
        "expert_used_count": shape.experts_used,
    }
    if traits.own_width:
        values["expert_feed_forward_length"] = shape.expert_width
    if traits.shared == "count":
        values["expert_shared_count"] = 1
    if traits.shared in {"width", "gated"}:
        values["expert_shared_feed_forward_length"] = shape.expert_width
    if traits.dense_layers:
        values["leading_dense_block_count"] = traits.dense_layers
    return {**values, **traits.metadata, **traits.sized(shape)}


def _add(file: Writer, key: str, value: Value) -> None:
    if isinstance(value, bool):
        file.out.add_bool(key, value)
    elif isinstance(value, int):
        file.out.add_uint32(key, value)
    elif isinstance(value, float):
        file.out.add_float32(key, value)
    else:
        file.out.add_array(key, value)
