"""What llama.cpp asserts instead of checking, or reads under a fixed type: such a file would abort the whole process.

The facts are from llama.cpp's src/llama-model.cpp (load_hparams), llama-vocab.cpp and llama-adapter.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgellm.models.gguf_values import Value

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
# Architectures whose graph asserts that keys, values and their rotated part are equally wide (src/models/*.cpp).
_EVEN_HEADS = frozenset({
    "arcee", "arctic", "baichuan", "dbrx", "deepseek", "dots1", "dream", "ernie4_5", "ernie4_5-moe", "exaone", "falcon",
    "granite", "grok", "hunyuan-moe", "internlm2", "llada", "llada-moe", "llama", "mistral3", "olmo", "olmo2", "olmoe",
    "orion", "plamo", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "seed_oss",
    "smollm3", "starcoder2", "xverse",
})  # fmt: skip
_NO_KERNELS = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})
_ROPE_SCALINGS = frozenset({"none", "linear", "yarn", "longrope"})

# Keys of one fixed type. "int" is any integer type.
_TYPES: dict[str, tuple[str, ...]] = {
    "general.architecture": ("string",),
    "general.type": ("string",),
    "general.name": ("string",),
    "adapter.type": ("string",),
    "adapter.lora.alpha": ("float32",),
    "adapter.alora.invocation_tokens": ("uint32[]",),
    "tokenizer.ggml.model": ("string",),
    "tokenizer.ggml.pre": ("string",),
    "tokenizer.ggml.tokens": ("string[]",),
    "tokenizer.ggml.scores": ("float32[]", "int32[]"),
    "tokenizer.ggml.token_type": ("int32[]",),
    "tokenizer.ggml.merges": ("string[]",),
    "tokenizer.chat_template": ("string",),
    "split.no": ("uint16",),
    "split.count": ("uint16",),
    "split.tensors.count": ("int32", "uint32", "uint16", "uint64", "int64"),
}


def check_metadata(metadata: Mapping[str, Value], types: Mapping[str, str]) -> str | None:
    """The first thing wrong with a file's metadata, in words, or None. `types` is GGUFHeader.value_types."""
    for key, allowed in _TYPES.items():
        if key in types and types[key] not in allowed:
            return f"{key} must be {' or '.join(allowed)}, not {types[key]}"
    number, count = metadata.get("split.no", 0), metadata.get("split.count", 1)
    if isinstance(number, int) and isinstance(count, int) and number >= max(count, 1):
        return f"split.no is {number} of {count}"
    if number != 0:
        return None  # only the first part of a split model carries the rest
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        return "general.architecture is missing"
    if metadata.get("general.type") == "adapter" or architecture == "clip":
        return None
    return _check_vocabulary(metadata) or _check_shape(architecture, metadata, types)


def check_tensor(name: str, n_dims: int, kind: str) -> str | None:
    """What is wrong with a tensor's type, in words, or None: llama.cpp has no CPU kernels for it, and finds that out
    in the middle of a step."""
    if name.endswith((".weight", ".lora_a", ".lora_b")) and kind in _NO_KERNELS:
        return f"is of type {kind}, which weights cannot have"
    if name.endswith("norm.weight") and n_dims == 1 and kind != "F32":
        return f"is of type {kind}, but norms must be F32"
    return None


def _length(value: Value | None) -> int | None:
    if value is None or isinstance(value, (int, float, str)):
        return None
    return len(value) if isinstance(value, tuple) else value.length


def _check_vocabulary(metadata: Mapping[str, Value]) -> str | None:
    tokens = _length(metadata.get("tokenizer.ggml.tokens"))
    if tokens is None:
        return None
    for part in ("scores", "token_type"):
        length = _length(metadata.get(f"tokenizer.ggml.{part}"))
        if length is not None and length < tokens:
            return f"tokenizer.ggml.{part} has only {length} entries for {tokens} tokens"
    return None


class _Numbers:
    """Integers under the architecture's name; -1 stands for a value of another type."""

    def __init__(self, architecture: str, metadata: Mapping[str, Value]) -> None:
        self.architecture = architecture
        self.metadata = metadata

    def one(self, key: str, default: int = 0) -> int:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        return value if isinstance(value, int) else -1

    def each(self, key: str) -> list[int]:
        """One number a layer, whether the file gives one for all or an array."""
        value = self.metadata.get(f"{self.architecture}.{key}", 0)
        if isinstance(value, tuple):
            return [item if isinstance(item, int) else 0 for item in value]
        return [self.one(key)] * max(self.one("block_count", 1), 1)

    def most(self, key: str) -> int:
        """The largest of all layers."""
        value = self.metadata.get(f"{self.architecture}.{key}", 0)
        if isinstance(value, tuple):
            return max((item for item in value if isinstance(item, int)), default=0)
        return self.one(key)


def _check_shape(architecture: str, metadata: Mapping[str, Value], types: Mapping[str, str]) -> str | None:
    numbers = _Numbers(architecture, metadata)
    layers = numbers.one("block_count", 1)
    if not 1 <= layers <= MAX_LAYERS:
        return f"{architecture}.block_count must be 1 to {MAX_LAYERS}"
    if not 0 <= numbers.one("nextn_predict_layers") <= layers:
        return f"{architecture}.nextn_predict_layers is more than block_count"
    for key in ("context_length", "embedding_length", "attention.head_count", "attention.head_count_kv"):
        name = f"{architecture}.{key}"
        if name in types and not types[name].removesuffix("[]").startswith(("uint", "int")):
            return f"{name} must be an integer, not {types[name]}"
        length = _length(metadata.get(name))
        if length is not None and length != layers:
            return f"{name} has {length} entries for {layers} layers"
    return _check_experts(numbers) or _check_heads(numbers)


def _check_experts(numbers: _Numbers) -> str | None:
    name = numbers.architecture
    experts, used = numbers.one("expert_count"), numbers.most("expert_used_count")
    groups = numbers.one("expert_group_count")
    if not 0 <= experts <= MAX_EXPERTS:
        return f"{name}.expert_count must be 0 to {MAX_EXPERTS}"
    if experts and not 1 <= used <= experts:
        return f"{name}.expert_used_count is {used} of {experts} experts"
    if (not experts and (used or groups)) or (experts and not 0 <= groups < experts):
        return f"{name}: {used} experts used in {groups} groups do not go with {experts} experts"
    if groups > 1 and (experts % groups or not 0 < numbers.one("expert_group_used_count") < groups):
        return f"{name}: {experts} experts do not divide into {groups} groups"
    return None


def _check_heads(numbers: _Numbers) -> str | None:
    name = numbers.architecture
    scaling = numbers.metadata.get(f"{name}.rope.scaling.type", "linear")
    if scaling not in _ROPE_SCALINGS:
        return f"{name}.rope.scaling.type {scaling!r} is unknown"
    heads, width = numbers.one("attention.head_count"), numbers.one("embedding_length")
    for layer_heads, layer_kv in zip(
        numbers.each("attention.head_count"), numbers.each("attention.head_count_kv"), strict=False
    ):
        if layer_heads > 0 and layer_kv > 0 and layer_heads % layer_kv:
            return f"{name}: {layer_heads} heads cannot share {layer_kv} heads of keys and values"
    if name not in _EVEN_HEADS or heads <= 0 or width <= 0:
        return None
    keys = numbers.one("attention.key_length", width // heads)
    values = numbers.one("attention.value_length", width // heads)
    rotated = numbers.one("rope.dimension_count", keys)
    if not keys == values == rotated:
        return f"{name}: keys, values and rotary embedding differ in width: {keys}, {values}, {rotated}"
    return None
