"""What the trainer must know of a decoder, read from its GGUF header; whatever it does not know is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from edgellm.errors import InvalidModelFileError, ModelUnsupportedError
from edgellm.models.gguf import GGUFHeader
from edgellm.models.gguf_values import GGUFArray

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
TARGETS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""The matrices of a layer that can be trained, in the order in which they are used."""

_NORMS = ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm")
_GEMMA_NORMS = ("post_attention_norm", "post_ffw_norm")
_GLOBAL = frozenset({"token_embd.weight", "output.weight", "output_norm.weight"})
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_GEMMA_PERIOD = 6  # layers 5, 11, ... see everything, the others a window (Gemma 3 report, section 2)
_GEMMA_LOCAL_BASE = 10_000.0
_GEMMA_27B_LAYERS = 62  # scales scores by the width of a head as if width were spread over the heads
# Keys whose effect is not implemented, with the values that have none.
_INERT: dict[str, tuple[object, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "expert_count": (0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
}

_Scalar = TypeVar("_Scalar", int, float)


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a decoder. Widths are in elements."""

    name: str
    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    norm_epsilon: float
    rope_base: float
    rope_width: int  # leading elements of a head that are turned; the rest pass
    rope_interleaved: bool  # pairs are (2i, 2i + 1), not (i, i + half)
    score_scale: float
    embedding_scale: float
    gelu: bool  # tanh GELU instead of SiLU
    window_tokens: int  # of local layers; 0: there are none
    local_rope_base: float
    period: int  # every period-th layer is global; 1: all

    def is_local(self, layer: int) -> bool:
        """Whether the layer sees only `window_tokens` back."""
        return self.window_tokens > 0 and layer % self.period < self.period - 1


def read_architecture(headers: Sequence[GGUFHeader]) -> Architecture:
    """The architecture of a model whose files have these headers.

    Raises ModelUnsupportedError for a model that the trainer would not compute as llama.cpp does,
    InvalidModelFileError where the header lacks what the model needs.
    """
    return _Reader(headers).read()


class _Reader:
    def __init__(self, headers: Sequence[GGUFHeader]) -> None:
        self._file_name = headers[0].path.name
        self._metadata = headers[0].metadata
        self._tensors = {tensor.name: tensor.dims for header in headers for tensor in header.tensors}
        name = self._metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            self._refuse(f"architecture {name!r} cannot be tuned, only {', '.join(ARCHITECTURES)}")
        self._name = str(name)

    def _refuse(self, why: str) -> None:
        raise ModelUnsupportedError(f"{self._file_name}: {why}")

    def _number(self, key: str, default: _Scalar | None = None, *, kind: type[_Scalar]) -> _Scalar:
        value = self._metadata.get(f"{self._name}.{key}", default)
        if isinstance(value, GGUFArray | tuple):
            self._refuse(f"layers differ in {key}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidModelFileError(f"{self._file_name}: {self._name}.{key} is missing or no number")
        return kind(value)

    def read(self) -> Architecture:
        for key, inert in _INERT.items():
            value = self._metadata.get(f"{self._name}.{key}", inert[0])
            if value not in inert:
                self._refuse(f"{key} = {value} is not supported in tuning")
        gemma = self._name == "gemma3"
        width, heads = self._number("embedding_length", kind=int), self._number("attention.head_count", kind=int)
        layers = self._number("block_count", kind=int)
        if min(width, heads, layers) < 1 or layers > len(self._tensors):
            raise InvalidModelFileError(f"{self._file_name}: has no layers, no heads or no width")
        head_width = self._number("attention.key_length", width // heads, kind=int)
        if head_width < 1 or self._number("attention.value_length", head_width, kind=int) != head_width:
            self._refuse("keys and values must be of one width")
        shape = Architecture(
            name=self._name,
            layers=layers,
            width=width,
            hidden=self._number("feed_forward_length", kind=int),
            heads=heads,
            kv_heads=self._number("attention.head_count_kv", heads, kind=int),
            head_width=head_width,
            vocabulary=(self._tensors.get("token_embd.weight") or (0,))[-1],
            norm_epsilon=self._number("attention.layer_norm_rms_epsilon", kind=float),
            rope_base=self._number("rope.freq_base", 10_000.0, kind=float),
            rope_width=self._number("rope.dimension_count", head_width, kind=int),
            rope_interleaved=self._name == "llama",
            score_scale=(width // heads if gemma and layers == _GEMMA_27B_LAYERS else head_width) ** -0.5,
            embedding_scale=width**0.5 if gemma else 1.0,
            gelu=gemma,
            window_tokens=self._number("attention.sliding_window", 0, kind=int),
            local_rope_base=self._number("rope.freq_base_swa", _GEMMA_LOCAL_BASE, kind=float),
            period=_GEMMA_PERIOD if gemma else 1,
        )
        self._check(shape)
        return shape

    def _check(self, shape: Architecture) -> None:
        """That the tensors are exactly those which are computed with, and of their shapes."""
        if shape.window_tokens and self._name != "gemma3":
            self._refuse("a sliding window is not supported in tuning")
        if f"{self._name}.attention.sliding_window_pattern" in self._metadata:
            self._refuse("a window pattern of its own is not supported in tuning")
        if shape.kv_heads < 1 or shape.heads % shape.kv_heads:
            raise InvalidModelFileError(f"{self._file_name}: heads do not divide as they must")
        if not 0 < shape.rope_width <= shape.head_width or shape.rope_width % 2:
            raise InvalidModelFileError(f"{self._file_name}: {shape.rope_width} elements of a head cannot be turned")
        if min(shape.rope_base, shape.local_rope_base) <= 0 or shape.norm_epsilon < 0 or shape.window_tokens < 0:
            raise InvalidModelFileError(f"{self._file_name}: a number is below zero that cannot be")
        shapes = _shapes(shape)
        for name, dims in self._tensors.items():
            match = _BLOCK.fullmatch(name)
            known = name in _GLOBAL or name == "rope_freqs.weight" or (match is not None and match[2] in shapes)
            if not known:
                self._refuse(f"tensor {name!r} is not supported in tuning")
            if match is not None and dims != (shapes[match[2]] if match[3] == "weight" else shapes[match[2]][-1:]):
                raise InvalidModelFileError(f"{self._file_name}: tensor {name!r} has impossible dimensions {dims}")
        norms = ("attn_norm", "ffn_norm")
        if self._name in ("qwen3", "gemma3"):
            norms = (*_NORMS, *(_GEMMA_NORMS if self._name == "gemma3" else ()))
        needed = [f"blk.{layer}.{part}.weight" for layer in range(shape.layers) for part in (*TARGETS, *norms)]
        for name in ("token_embd.weight", "output_norm.weight", *needed):
            if name not in self._tensors:
                raise InvalidModelFileError(f"{self._file_name}: tensor {name!r} is missing")
        table = (shape.width, shape.vocabulary)
        whole = {"token_embd": table, "output": table, "output_norm": (shape.width,)}
        for name, expected in (whole | {"rope_freqs": (shape.rope_width // 2,)}).items():
            if self._tensors.get(f"{name}.weight", expected) != expected:
                raise InvalidModelFileError(f"{self._file_name}: tensor {name!r} has impossible dimensions")


def _shapes(shape: Architecture) -> dict[str, tuple[int, ...]]:
    """A layer's weights, in ggml's order: (in, out), or (width,) of a norm."""
    width, queries, keys = shape.width, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (width, queries),
        "attn_k": (width, keys),
        "attn_v": (width, keys),
        "attn_output": (queries, width),
        "ffn_gate": (width, shape.hidden),
        "ffn_up": (width, shape.hidden),
        "ffn_down": (shape.hidden, width),
        "attn_norm": (width,),
        "ffn_norm": (width,),
    }
    if shape.name in ("qwen3", "gemma3"):
        shapes |= {"attn_q_norm": (shape.head_width,), "attn_k_norm": (shape.head_width,)}
    if shape.name == "gemma3":
        shapes |= {"post_attention_norm": (width,), "post_ffw_norm": (width,)}
    return shapes


def matrix_shape(shape: Architecture, target: str) -> tuple[int, int]:
    """(in, out) of one of TARGETS."""
    columns, rows = _shapes(shape)[target]
    return columns, rows
