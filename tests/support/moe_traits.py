"""In what the mixture-of-experts architectures differ, as far as their tensors and metadata go.

Read off llama.cpp's loader (src/models, one file for each architecture).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

SOFTMAX, SIGMOID = 1, 2  # expert_gating_func

Value = bool | int | float | list[int] | list[bool]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one file. All widths in elements."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    experts: int
    experts_used: int
    expert_width: int

    @property
    def head(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def dense_width(self) -> int:
        """Hidden width of the layers, and the parts of layers, that are not mixtures."""
        return 2 * self.width


@dataclass(frozen=True, slots=True)
class Traits:
    """One architecture. The defaults are Mixtral's shape with the expert width in a key of its own."""

    attention: str = "split"  # or "fused", "mla"
    recurrent: str = ""  # what stands for attention in two of three layers: "shortconv", "delta", "mamba2"
    biases: tuple[str, ...] = ()  # of the projections "q", "k", "v", "output"
    qk_norm: str = ""  # "head": over each head; "whole": over all of them
    sinks: bool = False
    gated_query: bool = False  # attn_q makes the query and a gate as wide
    equal_heads: bool = False  # as many heads for keys and values as for queries
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    output_norm: str = "output_norm"
    norm_biases: bool = False
    own_width: bool = True  # False: feed_forward_length is the experts' width
    router_bias: bool = False
    correction: bool = False  # exp_probs_b, added for choosing the experts alone
    expert_biases: bool = False
    gate_up: str = "separate"  # "either": may be merged into ffn_gate_up_exps
    shared: str = ""  # a shared expert, known by "count", "width" or "always"; "gated": by width, with a gate
    dense_layers: int = 0  # leading layers without experts
    moe_step: int = 1  # every how many layers there is a mixture
    beside: bool = False  # each mixture has an ordinary feed-forward block beside it
    layers: int = 3  # the fewest that show every kind of layer the architecture has
    metadata: Mapping[str, Value] = field(default_factory=dict)
    sized: Callable[[Shape], Mapping[str, Value]] = lambda shape: {}  # metadata that depends on the sizes

    def has_experts(self, layer: int) -> bool:
        """Whether `layer` is a mixture."""
        return layer >= self.dense_layers and (layer + 1) % self.moe_step == 0

    def is_recurrent(self, layer: int) -> bool:
        """Whether `layer` keeps a state instead of keys and values."""
        return bool(self.recurrent) and (layer + 1) % 3 != 0


KV_RANK = Q_RANK = 32
"""Width of the compressed keys and values, and queries, of multi-head latent attention."""
STATE, STATE_HEADS, CONV = 16, 4, 4
"""Width of a recurrent state, the number of states, and the length of the convolution before them."""


def _latent(shape: Shape) -> dict[str, Value]:
    return {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": Q_RANK,
        "attention.kv_lora_rank": KV_RANK,
        "attention.key_length": KV_RANK + shape.head,
        "attention.value_length": KV_RANK,
        "attention.key_length_mla": 2 * shape.head,
        "attention.value_length_mla": shape.head,
    }


def _short_convolution(shape: Shape) -> dict[str, Value]:
    counts = [shape.kv_heads if (layer + 1) % 3 == 0 else 0 for layer in range(shape.layers)]
    return {"attention.head_count_kv": counts, "shortconv.l_cache": 3}


def _delta(shape: Shape) -> dict[str, Value]:
    return {
        "ssm.conv_kernel": CONV,
        "ssm.inner_size": STATE * STATE_HEADS,
        "ssm.state_size": STATE,
        "ssm.time_step_rank": STATE_HEADS,
        "ssm.group_count": STATE_HEADS // 2,
        "full_attention_interval": 3,
        "rope.dimension_sections": [shape.head // 4, shape.head // 8, shape.head // 8, 0],
    }


def _mamba2(shape: Shape) -> dict[str, Value]:
    counts = [shape.kv_heads if (layer + 1) % 3 == 0 else 0 for layer in range(shape.layers)]
    return {
        "attention.head_count_kv": counts,
        "ssm.conv_kernel": CONV,
        "ssm.inner_size": 2 * shape.width,
        "ssm.state_size": STATE,
        "ssm.time_step_rank": STATE_HEADS,
        "ssm.group_count": 1,
        "rope.scaling.finetuned": False,
    }


def _gemma(shape: Shape) -> dict[str, Value]:
    return {
        "attention.key_length_swa": shape.head,
        "attention.value_length_swa": shape.head,
        "attention.sliding_window": 64,
        "attention.sliding_window_pattern": [layer % 3 != 2 for layer in range(shape.layers)],
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "rope.freq_base_swa": 10_000.0,
        "rope.dimension_count_swa": shape.head,
    }


_GRANITE: dict[str, Value] = {
    "logit_scale": 2.0,
    "residual_scale": 0.5,
    "embedding_scale": 3.0,
    "attention.scale": 0.2,
}
_POST_NORM = ("attn_norm", "post_attention_norm")
_SIGMOID: dict[str, Value] = {"expert_gating_func": SIGMOID, "expert_weights_norm": True, "expert_weights_scale": 1.5}

ARCHITECTURES: dict[str, Traits] = {
    "llama": Traits(own_width=False),
    "qwen2moe": Traits(biases=("q", "k", "v"), shared="gated"),
    "qwen3moe": Traits(qk_norm="head"),
    "olmoe": Traits(own_width=False, qk_norm="whole", equal_heads=True),
    "gpt-oss": Traits(
        biases=("q", "k", "v", "output"), sinks=True, norms=_POST_NORM, router_bias=True, expert_biases=True,
        metadata={"attention.sliding_window": 64},
    ),
    "deepseek": Traits(shared="count", dense_layers=1, metadata={"expert_weights_scale": 1.0}),
    "deepseek2": Traits(
        attention="mla", gate_up="either", shared="count", correction=True, dense_layers=1, metadata=_SIGMOID,
        sized=_latent,
    ),
    "granitemoe": Traits(own_width=False, shared="width", metadata=_GRANITE),
    "granitehybrid": Traits(
        own_width=False, recurrent="mamba2", shared="width", metadata=_GRANITE, sized=_mamba2
    ),
    "glm4moe": Traits(
        biases=("q", "k", "v"), qk_norm="head", norms=_POST_NORM, shared="count", correction=True, dense_layers=1,
        metadata=_SIGMOID,
    ),
    "phimoe": Traits(biases=("q", "k", "v", "output"), norm_biases=True, own_width=False),
    "dbrx": Traits(
        attention="fused", norms=("attn_norm", "attn_output_norm"), own_width=False,
        metadata={"attention.clamp_kqv": 8.0},
    ),
    "grok": Traits(norms=("attn_norm", "attn_output_norm", "ffn_norm", "layer_output_norm")),
    "ernie4_5-moe": Traits(
        shared="width", correction=True, dense_layers=1, metadata={"interleave_moe_layer_step": 1}
    ),
    "bailingmoe": Traits(shared="count", metadata={"expert_weights_scale": 1.0, "expert_weights_norm": True}),
    "bailingmoe2": Traits(
        attention="fused", qk_norm="head", shared="count", correction=True, dense_layers=1, metadata=_SIGMOID
    ),
    "dots1": Traits(
        qk_norm="head", equal_heads=True, shared="count", correction=True, dense_layers=1, metadata=_SIGMOID
    ),
    "hunyuan-moe": Traits(
        qk_norm="head", own_width=False, shared="width",
        sized=lambda shape: {"expert_feed_forward_length": shape.expert_width},
    ),
    "exaone-moe": Traits(
        qk_norm="head", shared="width", correction=True, dense_layers=1,
        metadata={**_SIGMOID, "attention.sliding_window": 64},
    ),
    "llama4": Traits(
        layers=4, shared="always", moe_step=2, metadata={"interleave_moe_layer_step": 2}
    ),
    "lfm2moe": Traits(
        recurrent="shortconv", qk_norm="head", output_norm="token_embd_norm", correction=True, dense_layers=1,
        metadata={"expert_gating_func": SIGMOID}, sized=_short_convolution,
    ),
    "qwen35moe": Traits(
        recurrent="delta", qk_norm="head", gated_query=True, norms=_POST_NORM, gate_up="either", shared="gated",
        sized=_delta,
    ),
    "gemma4": Traits(
        qk_norm="head", beside=True, gate_up="either", sized=_gemma,
        norms=(
            "attn_norm", "post_attention_norm", "ffn_norm", "pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2",
            "post_ffw_norm",
        ),
    ),
}  # fmt: skip
"""By the name in general.architecture."""
