"""A plain decoder with plain LoRA, as transformers and PEFT compute them: the slow reference. Needs torch.

Rows of queries and keys are in transformers' order: those of a llama GGUF are put back first. All weights are dense,
every layer has a graph, the loss is taken over the whole matrix of logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from edgellm.tune.architecture import TARGETS, Architecture
from edgellm.tune.scheme import Site
from edgellm.tune.weights import BaseWeights


def to_transformers(rows: Tensor, shape: Architecture, tensor: str) -> Tensor:
    """Rows of a matrix in a GGUF file, in transformers' order: pairs (2i, 2i + 1) of a head become (i, i + half)."""
    heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}.get(tensor)
    if shape.name != "llama" or heads is None:
        return rows
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


class DenseDecoder:
    """Of a llama, qwen2 or qwen3 file; `pairs` holds each trained matrix's A and B, B in transformers' order."""

    def __init__(self, weights: BaseWeights, pairs: dict[Site, tuple[Tensor, Tensor]], scale: float) -> None:
        self.shape, self.pairs, self.scale = weights.architecture, pairs, scale
        self.matrices: dict[Site, Tensor] = {}
        self.vectors: dict[str, Tensor] = {}
        for layer in range(self.shape.layers):
            for tensor in TARGETS:
                site = Site(layer, tensor)
                matrix = weights.matrix(site.name).expand(torch.float32)
                self.matrices[site] = to_transformers(matrix, self.shape, tensor)
                self._keep(weights, f"blk.{layer}.{tensor}.bias")
            for norm in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"):
                self._keep(weights, f"blk.{layer}.{norm}.weight")
        self._keep(weights, "output_norm.weight")
        self.embedding = weights.matrix("token_embd.weight").expand(torch.float32)
        head = "output.weight" if "output.weight" in weights else "token_embd.weight"
        self.head = weights.matrix(head).expand(torch.float32)

    def _keep(self, weights: BaseWeights, name: str) -> None:
        vector = weights.vector(name)
        if vector is not None:
            self.vectors[name] = vector

    def loss(self, sequence: list[int], answers: list[bool]) -> Tensor:
        """The sum over answer tokens, each predicted from those before it."""
        losses = F.cross_entropy(self.logits(sequence[:-1]), torch.tensor(sequence[1:]), reduction="none")
        return losses[torch.tensor(answers[1:])].sum()

    def logits(self, tokens: list[int]) -> Tensor:
        """(tokens, vocabulary)."""
        x = self.embedding[torch.tensor(tokens)]
        for layer in range(self.shape.layers):
            x = x + self._attend(self._norm(x, f"blk.{layer}.attn_norm"), layer)
            y = self._norm(x, f"blk.{layer}.ffn_norm")
            gate, up = self._linear(y, layer, "ffn_gate"), self._linear(y, layer, "ffn_up")
            x = x + self._linear(F.silu(gate) * up, layer, "ffn_down")
        return self._norm(x, "output_norm") @ self.head.T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.shape.norm_epsilon)
        return self.vectors[f"{name}.weight"] * (x * scale)

    def _linear(self, x: Tensor, layer: int, tensor: str) -> Tensor:
        site = Site(layer, tensor)
        y = x @ self.matrices[site].T
        if (bias := self.vectors.get(f"blk.{layer}.{tensor}.bias")) is not None:
            y = y + bias
        if site in self.pairs:
            a, b = self.pairs[site]
            y = y + self.scale * ((x @ a.T) @ b.T)
        return y

    def _attend(self, x: Tensor, layer: int) -> Tensor:
        shape, count = self.shape, len(x)
        q = self._linear(x, layer, "attn_q").view(count, shape.heads, -1)
        k = self._linear(x, layer, "attn_k").view(count, shape.kv_heads, -1)
        v = self._linear(x, layer, "attn_v").view(count, shape.kv_heads, -1)
        if f"blk.{layer}.attn_q_norm.weight" in self.vectors:
            q, k = self._norm(q, f"blk.{layer}.attn_q_norm"), self._norm(k, f"blk.{layer}.attn_k_norm")
        q, k = self._turn(q), self._turn(k)
        k, v = (part.repeat_interleave(shape.heads // shape.kv_heads, 1) for part in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / shape.head_width**0.5
        scores = scores + torch.full((count, count), -torch.inf).triu(1)
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(count, -1)
        return self._linear(mixed, layer, "attn_output")

    def _turn(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        angles = torch.arange(len(x))[:, None] * self.shape.rope_base ** (-torch.arange(0, width, 2) / width)
        angles = torch.cat((angles, angles), -1)[:, None]
        half = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), -1)
        return x * angles.cos() + half * angles.sin()
