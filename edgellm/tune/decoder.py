"""The forward pass of a decoder over quantised base weights and a LoRA adapter, for training.

Computes what llama.cpp computes (src/models there) for the architectures in architecture.py. Matrices multiply in
`dtype`; the residual stream, norms and rotations are float32. What is below the adapter's lowest layer never has a
graph, and torch leaves out what is below the lowest trained matrix of that layer, for nothing there needs a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edgellm.tune.attention import attention
from edgellm.tune.lora import Lora
from edgellm.tune.ops import gated, rms_norm, rotate
from edgellm.tune.scheme import Site
from edgellm.tune.weights import BaseWeights, Matrix, product

Angles = tuple[Tensor, Tensor]  # cosine and sine, (tokens, 1, pairs)


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences laid end to end; none sees another, and each begins at position 0."""

    tokens: Tensor  # (tokens,), int64
    lengths: tuple[int, ...]  # of the sequences, in order

    @property
    def positions(self) -> Tensor:
        """(tokens,), int64."""
        return torch.cat([torch.arange(length) for length in self.lengths])


def pack(sequences: Sequence[Sequence[int]]) -> Packed:
    """Raises ValueError for an empty sequence, or none."""
    if not sequences or not all(sequences):
        raise ValueError("a pack needs sequences of at least one token")
    return Packed(torch.tensor([token for one in sequences for token in one]), tuple(map(len, sequences)))


class Decoder:
    """A base model, frozen.

    With `recompute`, only each layer's input is kept for backward, and its forward pass is done again there
    (arXiv 1604.06174): a third more work for a fraction of the memory.
    """

    def __init__(self, weights: BaseWeights, *, dtype: torch.dtype, recompute: bool = False) -> None:
        self.weights = weights
        self.recompute = recompute
        self.shape = weights.architecture
        self.dtype = dtype
        self.head: Matrix = weights.matrix("output.weight" if "output.weight" in weights else "token_embd.weight")
        self._embedding = weights.matrix("token_embd.weight")
        self._output_norm = self._norm_weight("output_norm")

    # --- the pass, from tokens to what the output matrix takes

    def embed(self, packed: Packed) -> Tensor:
        """(tokens, width), float32."""
        used, places = packed.tokens.unique(return_inverse=True)
        return self._embedding.look_up(used)[places] * self.shape.embedding_scale

    def prefix(self, packed: Packed, end: int) -> Tensor:
        """The residual stream that layer `end` takes, (tokens, width), float32, from frozen layers alone; no graph."""
        with torch.no_grad():
            return self.layers(self.embed(packed), packed, range(end), None)

    def suffix(self, stream: Tensor, packed: Packed, lora: Lora) -> Tensor:
        """The residual stream behind the last layer, from the one that the adapter's lowest layer takes."""
        return self.layers(stream, packed, range(lora.lowest_layer, self.shape.layers), lora)

    def hidden(self, packed: Packed, lora: Lora | None = None) -> Tensor:
        """The residual stream behind the last layer, (tokens, width), float32."""
        if lora is None:
            return self.prefix(packed, self.shape.layers)
        return self.suffix(self.prefix(packed, lora.lowest_layer), packed, lora)

    def normalise(self, stream: Tensor) -> Tensor:
        """What the output matrix takes, (tokens, width), in `dtype`. Rows are independent: leave out unused ones."""
        return rms_norm(stream, self._output_norm, self.shape.norm_epsilon, self.dtype)

    def logits(self, packed: Packed, lora: Lora | None = None) -> Tensor:
        """(tokens, vocabulary), float32. The slow reference of `loss.token_losses`, which training uses."""
        return product(self.normalise(self.hidden(packed, lora)), self.head).float()

    def layers(self, stream: Tensor, packed: Packed, which: range, lora: Lora | None) -> Tensor:
        """The residual stream behind the layers `which`, (tokens, width)."""
        angles = self._angles(packed, self.shape.rope_base, self.weights.vector("rope_freqs.weight"))
        local = self._angles(packed, self.shape.local_rope_base, None) if self.shape.window_tokens else angles
        for layer in which:
            turns = local if self.shape.is_local(layer) else angles
            arguments = (stream, layer, packed.lengths, turns, lora)
            if lora is not None and self.recompute and torch.is_grad_enabled():
                stream = checkpoint(self._layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                stream = self._layer(*arguments)
        return stream

    # --- a layer

    def _layer(self, stream: Tensor, layer: int, lengths: Sequence[int], angles: Angles, lora: Lora | None) -> Tensor:
        return self._feed_forward(self._attend(stream, layer, lengths, angles, lora), layer, lora)

    def _attend(self, stream: Tensor, layer: int, lengths: Sequence[int], angles: Angles, lora: Lora | None) -> Tensor:
        shape, count = self.shape, len(stream)
        x = self._norm(stream, f"blk.{layer}.attn_norm")
        q, k, v = (
            self._linear(x, Site(layer, name), lora).view(count, heads, shape.head_width)
            for name, heads in (("attn_q", shape.heads), ("attn_k", shape.kv_heads), ("attn_v", shape.kv_heads))
        )
        if f"blk.{layer}.attn_q_norm.weight" in self.weights:
            q, k = (self._norm(part.float(), f"blk.{layer}.attn_{name}_norm") for name, part in (("q", q), ("k", k)))
        q, k = (rotate(part, *angles, interleaved=shape.rope_interleaved) for part in (q, k))
        window = shape.window_tokens if shape.is_local(layer) else 0
        mixed = attention(q, k, v, lengths, scale=shape.score_scale, window_tokens=window)
        return self._add(
            stream, self._linear(mixed, Site(layer, "attn_output"), lora), f"blk.{layer}.post_attention_norm"
        )

    def _feed_forward(self, stream: Tensor, layer: int, lora: Lora | None) -> Tensor:
        x = self._norm(stream, f"blk.{layer}.ffn_norm")
        gate, up = (self._linear(x, Site(layer, name), lora) for name in ("ffn_gate", "ffn_up"))
        y = self._linear(gated(gate, up, gelu=self.shape.gelu), Site(layer, "ffn_down"), lora)
        return self._add(stream, y, f"blk.{layer}.post_ffw_norm")

    def _linear(self, x: Tensor, site: Site, lora: Lora | None) -> Tensor:
        y = product(x, self.weights.matrix(site.name))
        bias = self.weights.vector(f"blk.{site.layer}.{site.tensor}.bias")
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y if lora is None else lora.add_to(y, x, site)

    def _add(self, stream: Tensor, y: Tensor, norm: str) -> Tensor:
        if f"{norm}.weight" in self.weights:
            y = rms_norm(y.float(), self._norm_weight(norm), self.shape.norm_epsilon, torch.float32)
        return stream + y

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self._norm_weight(name), self.shape.norm_epsilon, self.dtype)

    def _norm_weight(self, name: str) -> Tensor:
        weight = self.weights.vector(f"{name}.weight")
        if weight is None:
            raise KeyError(name)
        return weight

    def _angles(self, packed: Packed, base: float, factors: Tensor | None) -> Angles:
        """`factors`, (pairs,), stretch each pair's period (Llama 3.1's long context, made by the converter)."""
        pairs = self.shape.rope_width // 2
        frequencies = base ** (torch.arange(pairs, dtype=torch.float64) * -2 / self.shape.rope_width)
        if factors is not None:
            frequencies = frequencies / factors
        angles = (packed.positions[:, None] * frequencies)[:, None]  # (tokens, 1, pairs)
        return angles.cos().float(), angles.sin().float()
