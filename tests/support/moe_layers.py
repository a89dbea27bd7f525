"""Writes the layers of a tiny mixture of experts: attention or what stands for it, and the feed-forward part."""

from __future__ import annotations

import numpy as np

from tests.support.gguf_writer import Writer
from tests.support.moe_traits import CONV, KV_RANK, Q_RANK, STATE, STATE_HEADS, Shape, Traits

ROUTER_STD = 2.0
"""Standard deviation of a router's logits: the experts chosen depend on the token, and none has all the weight."""


def add_layer(file: Writer, shape: Shape, traits: Traits, layer: int, *, merged: bool) -> None:
    """One block. `merged` puts the experts' gate and up matrices into one tensor."""
    block = f"blk.{layer}"
    for norm in traits.norms:
        file.norm(f"{block}.{norm}", shape.width)
        if traits.norm_biases:
            file.uniform(f"{block}.{norm}.bias", shape.width)
    if traits.is_recurrent(layer):
        _RECURRENT[traits.recurrent](file, block, shape)
    elif traits.attention == "mla":
        _add_latent_attention(file, block, shape)
    else:
        _add_attention(file, block, shape, traits)
    if traits.beside or not traits.has_experts(layer):
        _add_dense(file, block, "", shape.width, shape.dense_width)
    if traits.has_experts(layer):
        _add_experts(file, block, shape, traits, merged=merged)


def _add_attention(file: Writer, block: str, shape: Shape, traits: Traits) -> None:
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    rows = {"q": queries * (2 if traits.gated_query else 1), "k": keys, "v": keys}
    if traits.attention == "fused":
        file.matrix(f"{block}.attn_qkv.weight", sum(rows.values()), shape.width)
    else:
        for part, count in rows.items():
            file.matrix(f"{block}.attn_{part}.weight", count, shape.width)
    file.matrix(f"{block}.attn_output.weight", shape.width, queries)
    for part, count in {**rows, "output": shape.width}.items():
        if part in traits.biases:
            file.uniform(f"{block}.attn_{part}.bias", count)
    if traits.qk_norm:
        file.norm(f"{block}.attn_q_norm", shape.head if traits.qk_norm == "head" else queries)
        file.norm(f"{block}.attn_k_norm", shape.head if traits.qk_norm == "head" else keys)
    if traits.sinks:
        file.uniform(f"{block}.attn_sinks.weight", shape.heads, scale=1.0)


def _add_latent_attention(file: Writer, block: str, shape: Shape) -> None:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1), the rotary part of a key as wide as the rest."""
    file.matrix(f"{block}.attn_q_a.weight", Q_RANK, shape.width)
    file.norm(f"{block}.attn_q_a_norm", Q_RANK)
    file.matrix(f"{block}.attn_q_b.weight", shape.heads * 2 * shape.head, Q_RANK)
    file.matrix(f"{block}.attn_kv_a_mqa.weight", KV_RANK + shape.head, shape.width)
    file.norm(f"{block}.attn_kv_a_norm", KV_RANK)
    file.matrix(f"{block}.attn_k_b.weight", shape.heads, KV_RANK, shape.head)
    file.matrix(f"{block}.attn_v_b.weight", shape.heads, shape.head, KV_RANK)
    file.matrix(f"{block}.attn_output.weight", shape.width, shape.heads * shape.head)


def _add_short_convolution(file: Writer, block: str, shape: Shape) -> None:
    file.uniform(f"{block}.shortconv.conv.weight", shape.width, 3, scale=1.0)
    file.matrix(f"{block}.shortconv.in_proj.weight", 3 * shape.width, shape.width)
    file.matrix(f"{block}.shortconv.out_proj.weight", shape.width, shape.width)


def _add_delta_net(file: Writer, block: str, shape: Shape) -> None:
    """Gated delta net (arXiv 2412.06464) with half as many heads for keys as for values."""
    keys, values = STATE * STATE_HEADS // 2, STATE * STATE_HEADS
    file.matrix(f"{block}.attn_qkv.weight", 2 * keys + values, shape.width)
    file.matrix(f"{block}.attn_gate.weight", values, shape.width)
    file.uniform(f"{block}.ssm_conv1d.weight", 2 * keys + values, CONV, scale=0.5)
    file.uniform(f"{block}.ssm_dt.bias", STATE_HEADS)
    file.plain(f"{block}.ssm_a", -np.linspace(0.5, 2.0, STATE_HEADS, dtype=np.float32))
    file.matrix(f"{block}.ssm_beta.weight", STATE_HEADS, shape.width)
    file.matrix(f"{block}.ssm_alpha.weight", STATE_HEADS, shape.width)
    file.norm(f"{block}.ssm_norm", STATE)
    file.matrix(f"{block}.ssm_out.weight", shape.width, values)


def _add_mamba2(file: Writer, block: str, shape: Shape) -> None:
    """Mamba 2 (arXiv 2405.21060) with one group."""
    inner = 2 * shape.width
    mixed = inner + 2 * STATE
    file.matrix(f"{block}.ssm_in.weight", inner + mixed + STATE_HEADS, shape.width)
    file.uniform(f"{block}.ssm_conv1d.weight", mixed, CONV, scale=0.5)
    file.uniform(f"{block}.ssm_conv1d.bias", mixed)
    file.uniform(f"{block}.ssm_dt.bias", STATE_HEADS)
    file.plain(f"{block}.ssm_a", -np.linspace(0.5, 2.0, STATE_HEADS, dtype=np.float32).reshape(-1, 1))
    file.plain(f"{block}.ssm_d", np.ones((STATE_HEADS, 1), np.float32))
    file.plain(f"{block}.ssm_norm.weight", np.ones((1, inner), np.float32))
    file.matrix(f"{block}.ssm_out.weight", shape.width, inner)


_RECURRENT = {"shortconv": _add_short_convolution, "delta": _add_delta_net, "mamba2": _add_mamba2}


def _add_dense(file: Writer, block: str, suffix: str, width: int, hidden: int) -> None:
    file.matrix(f"{block}.ffn_gate{suffix}.weight", hidden, width)
    file.matrix(f"{block}.ffn_up{suffix}.weight", hidden, width)
    file.matrix(f"{block}.ffn_down{suffix}.weight", width, hidden)


def _add_experts(file: Writer, block: str, shape: Shape, traits: Traits, *, merged: bool) -> None:
    width, hidden, experts = shape.width, shape.expert_width, shape.experts
    spread = ROUTER_STD * (3 / width) ** 0.5  # its input has variance 1
    file.uniform(f"{block}.ffn_gate_inp.weight", experts, width, scale=spread)
    if merged:
        file.matrix(f"{block}.ffn_gate_up_exps.weight", experts, 2 * hidden, width)
    else:
        file.matrix(f"{block}.ffn_gate_exps.weight", experts, hidden, width)
        file.matrix(f"{block}.ffn_up_exps.weight", experts, hidden, width)
    file.matrix(f"{block}.ffn_down_exps.weight", experts, width, hidden)
    if traits.router_bias:
        file.uniform(f"{block}.ffn_gate_inp.bias", experts)
    if traits.correction:
        file.uniform(f"{block}.exp_probs_b.bias", experts)
    if traits.expert_biases:
        for part, rows in (("gate", hidden), ("up", hidden), ("down", width)):
            file.uniform(f"{block}.ffn_{part}_exps.bias", experts, rows)
    if traits.shared:
        _add_dense(file, block, "_shexp", width, hidden)
    if traits.shared == "gated":
        file.uniform(f"{block}.ffn_gate_inp_shexp.weight", width, scale=0.5)
    if traits.beside:  # its router divides its input by the square root of the width
        file.plain(f"{block}.ffn_gate_inp.scale", np.full(width, width**0.5, np.float32))
        file.uniform(f"{block}.ffn_down_exps.scale", experts, scale=1.0)
