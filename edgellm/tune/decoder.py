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

from edgellm.tune.attention import Block, attention, blocks_of
from edgellm.tune.linear import Part, products
from edgellm.tune.lora import Lora
from edgellm.tune.ops import Angles, gated, grouped, rms_norm, ungrouped
from edgellm.tune.prefix_tree import Packed
from edgellm.tune.scheme import Site
from edgellm.tune.weights import BaseWeights, Matrix


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """What a layer's attention sees of a pack."""

    angles: Angles
    blocks: tuple[Block, ...]
    window: int  # tokens; 0: all


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
        return (self.normalise(self.hidden(packed, lora)) @ self.head.expand(self.dtype).T).float()

    def layers(self, stream: Tensor, packed: Packed, which: range, lora: Lora | None) -> Tensor:
        """The residual stream behind the layers `which`, (tokens, width)."""
        far = self._view(packed, self.shape.rope_base, self.weights.vector("rope_freqs.weight"), 0)
        near = far
        if self.shape.window_tokens:
            near = self._view(packed, self.shape.local_rope_base, None, self.shape.window_tokens)
        for layer in which:
            arguments = (stream, layer, near if self.shape.is_local(layer) else far, lora)
            if lora is not None and self.recompute and torch.is_grad_enabled():
                stream = checkpoint(self._layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                stream = self._layer(*arguments)
        return stream

    # --- a layer

    def _layer(self, stream: Tensor, layer: int, view: _View, lora: Lora | None) -> Tensor:
        return self._feed_forward(self._attend(stream, layer, view, lora), layer, lora)

    def _attend(self, stream: Tensor, layer: int, view: _View, lora: Lora | None) -> Tensor:
        shape, count = self.shape, len(stream)
        x = self._norm(stream, f"blk.{layer}.attn_norm")
        q, k, v = self._linear(x, [Site(layer, name) for name in ("attn_q", "attn_k", "attn_v")], lora)
        q = q.view(count, shape.heads, shape.head_width)
        k, v = (part.view(count, shape.kv_heads, shape.head_width) for part in (k, v))
        if f"blk.{layer}.attn_q_norm.weight" in self.weights:
            q, k = (self._norm(part.float(), f"blk.{layer}.attn_{name}_norm") for name, part in (("q", q), ("k", k)))
        share = shape.heads // shape.kv_heads
        q, k = (
            grouped(part, view.angles, share=wide, interleaved=shape.rope_interleaved)
            for part, wide in ((q, share), (k, 1))
        )
        mixed = attention(
            q, k, grouped(v), view.blocks, share=share, scale=shape.score_scale, window_tokens=view.window
        )
        (y,) = self._linear(ungrouped(mixed, share=share), [Site(layer, "attn_output")], lora)
        return self._add(stream, y, f"blk.{layer}.post_attention_norm")

    def _feed_forward(self, stream: Tensor, layer: int, lora: Lora | None) -> Tensor:
        x = self._norm(stream, f"blk.{layer}.ffn_norm")
        gate, up = self._linear(x, [Site(layer, "ffn_gate"), Site(layer, "ffn_up")], lora)
        (y,) = self._linear(gated(gate, up, gelu=self.shape.gelu), [Site(layer, "ffn_down")], lora)
        return self._add(stream, y, f"blk.{layer}.post_ffw_norm")

    def _linear(self, x: Tensor, sites: Sequence[Site], lora: Lora | None) -> tuple[Tensor, ...]:
        """x times each of these matrices, with its bias and its adapter."""
        parts = [
            Part(
                self.weights.matrix(site.name),
                self.weights.vector(f"blk.{site.layer}.{site.tensor}.bias"),
                None if lora is None else lora.pairs.get(site),
            )
            for site in sites
        ]
        return products(x, parts, 1.0 if lora is None else lora.config.scale)

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

    def _view(self, packed: Packed, base: float, factors: Tensor | None, window_tokens: int) -> _View:
        """`factors`, (pairs,), stretch each pair's period (Llama 3.1's long context, made by the converter)."""
        pairs = self.shape.rope_width // 2
        frequencies = base ** (torch.arange(pairs, dtype=torch.float64) * -2 / self.shape.rope_width)
        if factors is not None:
            frequencies = frequencies / factors
        angles = packed.positions[:, None] * frequencies
        blocks = blocks_of(packed.segments, window_tokens)
        return _View((angles.cos().float(), angles.sin().float()), blocks, window_tokens)
