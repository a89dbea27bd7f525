"""Tiny random GGUF files that llama.cpp loads and decodes: a few hundred kilobytes, written on the spot by tests.

The weights are random, so the text is noise, but everything around it is real: a byte-level BPE vocabulary with merges,
special tokens and a chat template, grouped-query attention, rotary embedding, mixtures of experts, LoRA pairs. The same
arguments always give the same bytes. Needs the development packages `gguf` and numpy.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from tests.support.gguf_writer import CHATML, Weights, Writer, add_bpe, add_general

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma3")
GEMMA_WINDOW = 16


def write_tiny_llama(
    path: Path | str,
    *,
    architecture: str = "llama",
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int | None = None,
    context: int = 512,
    seed: int = 0,
    chat_template: str | None = CHATML,
    weights: str = "f32",
    experts: int = 0,
    experts_used: int = 2,
    tied: bool = False,
    norm_spread: float = 0.0,
) -> Path:
    """A decoder of one of ARCHITECTURES. `experts` > 0 makes a mixture (llama: Mixtral's shape).

    `weights` is "f32" or "q8_0" (then `width` must be a multiple of 32). `vocab` None is the smallest vocabulary.
    `tied`: there is no output matrix, the embedding serves. Norms weigh 1, give or take `norm_spread`.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}")
    if (architecture == "qwen3moe") != (experts > 0) and architecture != "llama":
        raise ValueError("qwen3moe needs experts, the others have none")
    file = Writer(path, architecture, seed, weights, norm_spread)
    wide = architecture in {"qwen3", "gemma3"}
    out, hidden, head = file.out, 2 * width, width // heads * (2 if wide else 1)
    add_general(out, f"Tiny {architecture}", weights)
    out.add_block_count(layers)
    out.add_context_length(context)
    out.add_embedding_length(width)
    out.add_feed_forward_length(hidden)
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(head)
    out.add_rope_freq_base(10_000.0)
    if wide:
        out.add_key_length(head)
        out.add_value_length(head)
    if architecture == "gemma3":
        out.add_sliding_window(GEMMA_WINDOW)
    if experts:
        out.add_expert_count(experts)
        out.add_expert_used_count(experts_used)
    if architecture == "qwen3moe":
        out.add_expert_feed_forward_length(hidden)
    tokens = add_bpe(out, vocab, chat_template)
    out.add_vocab_size(tokens)
    file.matrix("token_embd.weight", tokens, width, scale=width**0.5)
    if not tied:
        file.matrix(
            "output.weight", tokens, width, scale=3.0
        )  # logits of standard deviation 3: neither flat nor frozen
    file.norm("output_norm", width)
    for layer in range(layers):
        _add_attention(file, f"blk.{layer}", architecture, width, head, heads, kv_heads)
        _add_feed_forward(file, f"blk.{layer}", width, hidden, experts)
    file.close()
    return Path(path)


def _add_attention(
    file: Writer, block: str, architecture: str, width: int, head: int, heads: int, kv_heads: int
) -> None:
    file.norm(f"{block}.attn_norm", width)
    for part, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
        file.matrix(f"{block}.attn_{part}.weight", rows, width)
        if architecture == "qwen2":
            file.uniform(f"{block}.attn_{part}.bias", rows)
    file.matrix(f"{block}.attn_output.weight", width, heads * head)
    if architecture in {"qwen3", "qwen3moe", "gemma3"}:
        for part in ("q", "k"):
            file.norm(f"{block}.attn_{part}_norm", head)
    if architecture == "gemma3":
        file.norm(f"{block}.post_attention_norm", width)
        file.norm(f"{block}.post_ffw_norm", width)


def _add_feed_forward(file: Writer, block: str, width: int, hidden: int, experts: int) -> None:
    file.norm(f"{block}.ffn_norm", width)
    stack, suffix = ((experts,), "_exps") if experts else ((), "")
    if experts:
        file.uniform(f"{block}.ffn_gate_inp.weight", experts, width, scale=1.0)
    file.matrix(f"{block}.ffn_gate{suffix}.weight", *stack, hidden, width)
    file.matrix(f"{block}.ffn_up{suffix}.weight", *stack, hidden, width)
    file.matrix(f"{block}.ffn_down{suffix}.weight", *stack, width, hidden)


def write_tiny_lora(
    path: Path | str,
    base: Path | str,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
    magnitude: float = 0.1,
    targets: tuple[str, ...] = ("attn_q", "attn_v", "ffn_down"),
) -> Path:
    """A random LoRA adapter for the decoder `base`: A (rank, in) and B (out, rank) for the targets of every block.

    Entries have standard deviation `magnitude`; 0 makes an adapter that changes nothing.
    """
    reader = gguf.GGUFReader(str(base))
    architecture = str(reader.fields["general.architecture"].contents())
    out = gguf.GGUFWriter(str(path), architecture)
    out.add_type("adapter")
    out.add_name("Tiny LoRA")
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", alpha)
    random = np.random.default_rng(seed)
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if len(parts) == 4 and parts[0] == "blk" and parts[2] in targets and parts[3] == "weight":
            inner, outer = (int(size) for size in tensor.shape[:2])  # ggml order: (in, out)
            for suffix, shape in (("lora_a", (rank, inner)), ("lora_b", (outer, rank))):
                data: Weights = random.standard_normal(shape, dtype=np.float32) * np.float32(magnitude)
                out.add_tensor(f"{tensor.name}.{suffix}", data)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return Path(path)


def write_tiny_mamba(
    path: Path | str, *, layers: int = 2, width: int = 64, state: int = 16, context: int = 512, seed: int = 0
) -> Path:
    """A recurrent model (Mamba 1): no KV cache, a fixed state for each sequence."""
    file = Writer(path, "mamba", seed)
    out, inner, conv, rank = file.out, 2 * width, 4, max(1, width // 16)
    add_general(out, "Tiny mamba", "f32")
    out.add_block_count(layers)
    out.add_context_length(context)
    out.add_embedding_length(width)
    out.add_feed_forward_length(0)
    out.add_head_count(0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_ssm_conv_kernel(conv)
    out.add_ssm_inner_size(inner)
    out.add_ssm_state_size(state)
    out.add_ssm_time_step_rank(rank)
    tokens = add_bpe(out, None, CHATML)
    out.add_vocab_size(tokens)
    file.matrix("token_embd.weight", tokens, width, scale=width**0.5)
    file.matrix("output.weight", tokens, width, scale=3.0)
    file.plain("output_norm.weight", np.ones(width, np.float32))
    decay = -np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1))  # (inner, state), S4D-real
    for block in (f"blk.{layer}" for layer in range(layers)):
        file.plain(f"{block}.attn_norm.weight", np.ones(width, np.float32))
        file.matrix(f"{block}.ssm_in.weight", 2 * inner, width)
        file.uniform(f"{block}.ssm_conv1d.weight", inner, conv, scale=0.5)
        file.uniform(f"{block}.ssm_conv1d.bias", inner)
        file.matrix(f"{block}.ssm_x.weight", rank + 2 * state, inner)
        file.matrix(f"{block}.ssm_dt.weight", inner, rank)
        file.uniform(f"{block}.ssm_dt.bias", inner)
        file.plain(f"{block}.ssm_a", decay)
        file.plain(f"{block}.ssm_d", np.ones(inner, np.float32))
        file.matrix(f"{block}.ssm_out.weight", width, inner)
    file.close()
    return Path(path)


def write_tiny_bert(
    path: Path | str, *, layers: int = 2, width: int = 64, heads: int = 4, context: int = 128, seed: int = 0
) -> Path:
    """An embedding model of BERT's shape with mean pooling and a WordPiece vocabulary of single ASCII characters."""
    file = Writer(path, "bert", seed)
    out, hidden = file.out, 2 * width
    add_general(out, "Tiny BERT", "f32")
    out.add_block_count(layers)
    out.add_context_length(context)
    out.add_embedding_length(width)
    out.add_feed_forward_length(hidden)
    out.add_head_count(heads)
    out.add_layer_norm_eps(1e-12)
    out.add_causal_attention(False)
    out.add_pooling_type(gguf.PoolingType.MEAN)
    tokens = _add_wordpiece(out)
    out.add_vocab_size(tokens)
    file.matrix("token_embd.weight", tokens, width, scale=width**0.5)
    file.uniform("position_embd.weight", context, width)
    file.uniform("token_types.weight", 2, width)
    _add_layer_norm(file, "token_embd_norm", width)
    for block in (f"blk.{layer}" for layer in range(layers)):
        shapes = (("attn_q", width, width), ("attn_k", width, width), ("attn_v", width, width))
        shapes += (("attn_output", width, width), ("ffn_up", hidden, width), ("ffn_down", width, hidden))
        for name, rows, columns in shapes:
            file.matrix(f"{block}.{name}.weight", rows, columns)
            file.uniform(f"{block}.{name}.bias", rows)
        _add_layer_norm(file, f"{block}.attn_output_norm", width)
        _add_layer_norm(file, f"{block}.layer_output_norm", width)
    file.close()
    return Path(path)


def _add_layer_norm(file: Writer, name: str, width: int) -> None:
    file.plain(f"{name}.weight", np.ones(width, np.float32))
    file.plain(f"{name}.bias", np.zeros(width, np.float32))


def _add_wordpiece(out: gguf.GGUFWriter) -> int:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    out.add_tokenizer_model("bert")
    out.add_token_type_count(2)
    out.add_token_list(special + ["▁" + letter for letter in letters] + letters)  # "▁" marks the start of a word
    out.add_token_types([gguf.TokenType.CONTROL] * len(special) + [gguf.TokenType.NORMAL] * (2 * len(letters)))
    out.add_pad_token_id(0)
    out.add_unk_token_id(1)
    out.add_bos_token_id(2)
    out.add_sep_token_id(3)
    out.add_eos_token_id(3)
    out.add_mask_token_id(4)
    return len(special) + 2 * len(letters)
