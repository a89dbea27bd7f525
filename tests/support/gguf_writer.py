"""What every tiny GGUF file is made with: a byte-level BPE vocabulary, general metadata, seeded random tensors.

Needs the development packages `gguf` and numpy. scripts/make_random_moe writes the same vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WEIGHTS = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")
"""The types that `Writer` packs matrices in; rows of a quantised one are a multiple of 32 long."""

_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32, "mxfp4": 38}
_WORDS = ("the", "and", "of", "to", "in", "hello", "world", "true", "false", "null", "name", "you", "is", "user")


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes, in byte order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)]


def vocabulary() -> tuple[list[str], list[str]]:
    """(tokens, merges) of the tiny byte-level BPE: 256 bytes, then one token a merge, then SPECIAL_TOKENS."""
    tokens, merges = byte_symbols(), []
    for word in _WORDS:
        pairs = [(word[:end], word[end]) for end in range(1, len(word))] + [("Ġ", word)]  # "Ġ" is the space
        for left, right in pairs:
            if left + right not in tokens:
                merges.append(f"{left} {right}")
                tokens.append(left + right)
    return tokens + list(SPECIAL_TOKENS), merges


class Writer:
    """A GGUFWriter that draws its tensors from one seeded generator and packs the matrices as `weights`."""

    def __init__(
        self, path: Path | str, architecture: str, seed: int, weights: str = "f32", norm_spread: float = 0.0
    ) -> None:
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, not {weights!r}")
        self.out = gguf.GGUFWriter(str(path), architecture)
        self._random = np.random.default_rng(seed)
        self._norm_spread = norm_spread
        self._type = gguf.GGMLQuantizationType[weights.upper()]

    def matrix(self, name: str, *shape: int, scale: float = 1.0) -> None:
        """A random (..., out, in) tensor with variance scale**2 / in."""
        data: Weights = self._random.standard_normal(shape, dtype=np.float32) * np.float32(scale / shape[-1] ** 0.5)
        if self._type == gguf.GGMLQuantizationType.F32:
            self.out.add_tensor(name, data)
        else:
            self.out.add_tensor(name, gguf.quants.quantize(data, self._type), raw_dtype=self._type)

    def plain(self, name: str, data: Weights) -> None:
        """A tensor that stays f32: norms, biases, routers, state matrices."""
        self.out.add_tensor(name, np.ascontiguousarray(data, dtype=np.float32))

    def uniform(self, name: str, *shape: int, scale: float = 0.1) -> None:
        """A random f32 tensor, evenly spread over -scale .. scale."""
        self.plain(name, self._random.uniform(-scale, scale, shape).astype(np.float32))

    def norm(self, name: str, width: int) -> None:
        """The weight of a norm that leaves what it has normalised as it is, give or take `norm_spread`."""
        weight = np.ones(width, np.float32)
        if self._norm_spread:
            weight += self._random.uniform(-self._norm_spread, self._norm_spread, width).astype(np.float32)
        self.plain(f"{name}.weight", weight)

    def close(self) -> None:
        self.out.write_header_to_file()
        self.out.write_kv_data_to_file()
        self.out.write_tensors_to_file()
        self.out.close()


def add_general(out: gguf.GGUFWriter, name: str, weights: str) -> None:
    """The metadata that says what the file is."""
    out.add_name(name)
    out.add_license("apache-2.0")
    out.add_file_type(_FILE_TYPES[weights])
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_bpe(out: gguf.GGUFWriter, vocab: int | None = None, chat_template: str | None = CHATML) -> int:
    """Write the tokenizer, padded with unused tokens to `vocab`; the number of tokens."""
    tokens, merges = vocabulary()
    if vocab is not None and vocab < len(tokens):
        raise ValueError(f"vocab must be at least {len(tokens)}")
    unused = (vocab or len(tokens)) - len(tokens)
    normal = len(tokens) - len(SPECIAL_TOKENS)
    kinds = [gguf.TokenType.NORMAL] * normal + [gguf.TokenType.CONTROL] * len(SPECIAL_TOKENS)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens + [f"<|unused_{i}|>" for i in range(unused)])
    out.add_token_types(kinds + [gguf.TokenType.UNUSED] * unused)
    out.add_token_merges(merges)
    out.add_bos_token_id(normal)
    out.add_eos_token_id(normal + SPECIAL_TOKENS.index("<|im_end|>"))
    out.add_pad_token_id(normal)
    out.add_add_bos_token(False)
    if chat_template is not None:
        out.add_chat_template(chat_template)
    return len(tokens) + unused
