"""What a GGUF file is, in the terms that users and the planner of memory need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.models.ggml_types import FILE_TYPES
from edgellm.models.gguf import GGUFHeader, TensorInfo, read_header
from edgellm.models.gguf_values import Value
from edgellm.models.packs import STACKED_EXPERTS, is_pack, model_tensors
from edgellm.models.split import split_headers

_POOLING = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}
# llama.cpp itself makes these non-causal, whatever the file says (src/models/*.cpp).
_LOOKS_BOTH_WAYS = frozenset({"gemma-embedding", "dream", "llada", "llada-moe", "rnd1"})
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
_TOKENIZERS = {"gpt2": "bpe", "llama": "sentencepiece", "t5": "unigram", "bert": "wordpiece", "rwkv": "rwkv"}


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A LoRA adapter. Its strength is alpha / rank; `rank` is the largest of its pairs."""

    kind: str
    rank: int
    alpha: float


@dataclass(frozen=True, slots=True)
class StateShape:
    """Numbers kept for each sequence and recurrent layer (f32 elements), and how many layers keep them."""

    layers: int
    conv_elements: int
    state_elements: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model or adapter file. A number the file does not give is 0."""

    path: Path
    files: tuple[Path, ...]  # more than one if the model is split
    architecture: str  # of an adapter: its base's
    name: str
    parameters: int
    file_bytes: int  # over all files
    tensor_bytes: int
    matrix_bytes: Mapping[str, int]  # of the two-dimensional tensors, by type: "Q4_K"
    expert_bytes: int  # of the stacked expert tensors, in memory
    packed: bool  # an expert pack: it can be paged, and not be mapped
    quantisation: str  # as in file names: "Q4_K_M"
    context_tokens: int  # that the model was trained on
    layers: int
    embedding_width: int
    heads: int  # largest of all layers
    kv_heads: tuple[int, ...]  # (layers,); 0 where a layer has no attention
    key_width: int  # of one head
    value_width: int
    feed_forward_width: int
    vocabulary: int
    tokenizer: str  # "bpe", "sentencepiece", "wordpiece", "unigram", "rwkv", or as the file says
    chat_template: str | None
    named_templates: Mapping[str, str] = field(default_factory=dict)  # such as "tool_use"
    experts: int = 0
    experts_used: int = 0
    pooling: str | None = None  # "mean", "cls", "last", "rank" (a reranker), "none"; None: the file does not say
    causal: bool = True
    recurrent: bool = False  # keeps a state in place of, or beside, a KV cache
    state: StateShape | None = None
    adapter: AdapterInfo | None = None
    licence: str | None = None

    @property
    def is_adapter(self) -> bool:
        return self.adapter is not None

    @property
    def is_embedding(self) -> bool:
        """Made for embeddings, not for text: it pools, or its attention looks both ways."""
        return not self.causal or self.pooling not in (None, "none")


def describe(source: GGUFHeader | Path | str) -> ModelInfo:
    """The facts about the model whose (first) file or header is `source`.

    Raises what `read_header` and `split_headers` raise.
    """
    header = source if isinstance(source, GGUFHeader) else read_header(source)
    headers = split_headers(header)
    tensors = [tensor for part in headers for tensor in model_tensors(part)]
    facts = _Facts(header)
    is_adapter = facts.text("general.type") == "adapter"
    layers = facts.number("block_count")
    heads = max(facts.per_layer("attention.head_count", layers), default=0)
    width = facts.number("embedding_length")
    kv_heads = facts.per_layer("attention.head_count_kv", layers) if facts.has("attention.head_count_kv") else None
    pooling = facts.own("pooling_type")
    return ModelInfo(
        path=header.path,
        files=tuple(part.path for part in headers),
        architecture=facts.architecture,
        name=facts.text("general.name") or header.path.stem,
        parameters=sum(tensor.elements for tensor in tensors),
        file_bytes=sum(part.file_bytes for part in headers),
        tensor_bytes=sum(tensor.n_bytes for tensor in tensors),
        matrix_bytes=_bytes_by_type(tensor for tensor in tensors if len(tensor.dims) == 2),
        expert_bytes=sum(tensor.n_bytes for tensor in tensors if STACKED_EXPERTS.fullmatch(tensor.name)),
        packed=is_pack(header),
        quantisation=_quantisation(header, tensors),
        context_tokens=facts.number("context_length"),
        layers=layers,
        embedding_width=width,
        heads=heads,
        kv_heads=kv_heads if kv_heads is not None else facts.per_layer("attention.head_count", layers),
        key_width=facts.number("attention.key_length") or (width // heads if heads else 0),
        value_width=facts.number("attention.value_length") or (width // heads if heads else 0),
        feed_forward_width=max(facts.per_layer("feed_forward_length", max(layers, 1)), default=0),
        vocabulary=_vocabulary(header, facts),
        tokenizer=_tokenizer(facts),
        chat_template=facts.text("tokenizer.chat_template"),
        named_templates=_named_templates(header),
        experts=facts.number("expert_count"),
        experts_used=max(facts.per_layer("expert_used_count", max(layers, 1)), default=0),
        pooling=_POOLING.get(pooling, str(pooling)) if isinstance(pooling, int) else None,
        causal=facts.own("attention.causal") is not False and facts.architecture not in _LOOKS_BOTH_WAYS,
        recurrent=facts.architecture in _RECURRENT or _state(facts, headers) is not None,
        state=_state(facts, headers),
        adapter=_adapter(header, facts) if is_adapter else None,
        licence=facts.text("general.license"),
    )


class _Facts:
    """Typed access to metadata: `own` keys stand under the architecture's name."""

    def __init__(self, header: GGUFHeader) -> None:
        self._metadata = header.metadata
        self.architecture = self.text("general.architecture") or ""

    def text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        return value if isinstance(value, str) and value else None

    def own(self, key: str) -> Value | None:
        return self._metadata.get(f"{self.architecture}.{key}")

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self._metadata

    def number(self, key: str) -> int:
        value = self.own(key)
        return value if isinstance(value, int) and value > 0 else 0

    def per_layer(self, key: str, layers: int) -> tuple[int, ...]:
        """One number a layer, whether the file gives one for all or an array."""
        value = self.own(key)
        if isinstance(value, tuple):
            return tuple(item if isinstance(item, int) and item > 0 else 0 for item in value)
        return (self.number(key),) * layers


def _vocabulary(header: GGUFHeader, facts: _Facts) -> int:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, tuple):
        return len(tokens)
    if tokens is not None and not isinstance(tokens, (int, float, str)):
        return tokens.length
    return facts.number("vocab_size")


def _tokenizer(facts: _Facts) -> str:
    model = facts.text("tokenizer.ggml.model") or ""
    return _TOKENIZERS.get(model, model)


def _named_templates(header: GGUFHeader) -> dict[str, str]:
    prefix = "tokenizer.chat_template."
    return {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix) and isinstance(value, str)
    }


def _bytes_by_type(tensors: Iterable[TensorInfo]) -> dict[str, int]:
    held: dict[str, int] = {}
    for tensor in tensors:
        held[tensor.type.name] = held.get(tensor.type.name, 0) + tensor.n_bytes
    return held


def _quantisation(header: GGUFHeader, tensors: Iterable[TensorInfo]) -> str:
    """From general.file_type; else the type that holds most of the bytes."""
    code = header.metadata.get("general.file_type")
    if isinstance(code, int) and code in FILE_TYPES:
        return FILE_TYPES[code]
    held = _bytes_by_type(tensors)
    return max(held, key=lambda name: held[name]) if held else "unknown"


def _adapter(header: GGUFHeader, facts: _Facts) -> AdapterInfo:
    alpha = header.metadata.get("adapter.lora.alpha", 0.0)
    ranks = [tensor.dims[1] for tensor in header.tensors if tensor.name.endswith(".lora_a") and len(tensor.dims) > 1]
    return AdapterInfo(
        kind=facts.text("adapter.type") or "unknown",
        rank=max(ranks, default=0),
        alpha=float(alpha) if isinstance(alpha, (int, float)) else 0.0,
    )


def _state(facts: _Facts, headers: tuple[GGUFHeader, ...]) -> StateShape | None:
    """The recurrent state of Mamba, RWKV, LFM2 and their hybrids (llama.cpp: llama_hparams::n_embd_r, n_embd_s)."""
    width, heads = facts.number("embedding_length"), max(facts.per_layer("attention.head_count", 1), default=0)
    layers = facts.number("block_count")
    if head := facts.number("wkv.head_size"):
        return StateShape(layers, max(1, facts.number("token_shift_count") or 2) * width, width * head)
    if cache := facts.number("shortconv.l_cache"):
        return StateShape(_layers_with(headers, "shortconv"), width * (cache - 1), 0)
    kernel = facts.number("ssm.conv_kernel")
    if head := facts.number("kda.head_dim"):
        layers = _layers_with(headers, "ssm_", layers)
        return StateShape(layers, 3 * (max(kernel, 4) - 1) * heads * head, head * head * heads)
    if inner := facts.number("ssm.inner_size"):
        state, groups = facts.number("ssm.state_size"), facts.number("ssm.group_count")
        layers = _layers_with(headers, "ssm_", layers)
        return StateShape(layers, max(0, kernel - 1) * (inner + 2 * groups * state), state * inner)
    return None


def _layers_with(headers: tuple[GGUFHeader, ...], part: str, otherwise: int = 0) -> int:
    """Blocks that have a tensor whose name begins with `part`."""
    blocks: set[str] = set()
    for tensor in (tensor for header in headers for tensor in header.tensors):
        pieces = tensor.name.split(".", 2)
        if len(pieces) == 3 and pieces[0] == "blk" and pieces[2].startswith(part):
            blocks.add(pieces[1])
    return len(blocks) or otherwise
