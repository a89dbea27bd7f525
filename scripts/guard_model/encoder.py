"""The encoder: the first layers of a pretrained BERT, and one logit for each output.

The outputs read the first token's state after the last layer, and of the states before it the mean and the highest
values. So the last layer computes one token alone, which is a sixth of a layer; the mean is what the pretraining of
MiniLM put its meaning in (Reimers and Gurevych 2019, section 3), and what stands beside a few words thins out the
mean, but not the highest values.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from guard_model.encoding import OUTPUTS, WINDOW

HEADS = 12
_NORM_EPSILON = 1e-12


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each with its residual and norm after it (BERT's order)."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None, first: bool) -> torch.Tensor:
        """`x`: (windows, tokens, width). `seen`: (windows, 1, 1, tokens), false for padding; None: all of them.
        `first`: only the first token's state, (windows, 1, width), is wanted."""
        windows, _, width = x.shape
        asking = x[:, :1] if first else x
        if first:
            weight, bias = self.query_key_value.weight, self.query_key_value.bias
            query = functional.linear(asking, weight[:width], bias[:width])
            key, value = functional.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        else:
            query, key, value = self.query_key_value(x).chunk(3, dim=-1)
        heads = (windows, -1, HEADS, width // HEADS)
        query, key, value = (part.view(heads).transpose(1, 2) for part in (query, key, value))
        if torch.onnx.is_in_onnx_export():
            scores = query @ key.transpose(-1, -2) * (width // HEADS) ** -0.5
            mixed = torch.softmax(scores, dim=-1) @ value
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value, seen)
        mixed = mixed.transpose(1, 2).reshape(windows, -1, width)
        asking = self.attention_norm(asking + self.dropout(self.out(mixed)))
        return self.norm(asking + self.dropout(self.down(functional.gelu(self.up(asking)))))


class Encoder(nn.Module):
    """Embeddings, layers, a head of two dense layers, and a logit for each of OUTPUTS."""

    def __init__(self, vocabulary: int, width: int, inner: int, layers: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(WINDOW, width))
        self.norm = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, inner, dropout) for _ in range(layers))
        self.head = nn.Sequential(
            nn.Linear(3 * width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, len(OUTPUTS))
        )

    def forward(self, ids: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """`ids`: (windows, tokens), at most WINDOW tokens. `seen`: the same shape, false for padding; None: all tokens
        count. Logits: (windows, outputs)."""
        x = self.dropout(self.norm(self.words(ids) + self.positions[: ids.shape[1]]))
        wide = None if seen is None else seen[:, None, None, :]
        for layer in self.layers[:-1]:
            x = layer(x, wide, first=False)
        if seen is None:
            mean, highest = x.mean(1), x.amax(1)
        else:
            counted = seen[:, :, None].to(x.dtype)
            mean = (x * counted).sum(1) / counted.sum(1)
            highest = x.masked_fill(~seen[:, :, None], -torch.inf).amax(1)
        first = self.layers[-1](x, wide, first=True)[:, 0]
        return self.head(torch.cat([first, mean, highest], dim=-1))


def pretrained(file: Path, layers: int) -> Encoder:
    """The first `layers` layers of a BERT in `file` (model.safetensors, names as in Hugging Face's BertModel). The
    outputs start at random, by torch's seed."""
    found = {key.removeprefix("bert."): value.float() for key, value in load_file(file).items()}
    words = found["embeddings.word_embeddings.weight"]
    inner = found["encoder.layer.0.intermediate.dense.weight"].shape[0]
    encoder = Encoder(words.shape[0], words.shape[1], inner, layers)
    state = {
        "words.weight": words,
        # Every token is of the first type, so that its embedding is part of the positions.
        "positions": found["embeddings.position_embeddings.weight"][:WINDOW]
        + found["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": found["embeddings.LayerNorm.weight"],
        "norm.bias": found["embeddings.LayerNorm.bias"],
    }
    for number in range(layers):
        theirs, ours = f"encoder.layer.{number}", f"layers.{number}"
        for part in ("weight", "bias"):
            joined = [found[f"{theirs}.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            state[f"{ours}.query_key_value.{part}"] = torch.cat(joined)
            state[f"{ours}.out.{part}"] = found[f"{theirs}.attention.output.dense.{part}"]
            state[f"{ours}.attention_norm.{part}"] = found[f"{theirs}.attention.output.LayerNorm.{part}"]
            state[f"{ours}.up.{part}"] = found[f"{theirs}.intermediate.dense.{part}"]
            state[f"{ours}.down.{part}"] = found[f"{theirs}.output.dense.{part}"]
            state[f"{ours}.norm.{part}"] = found[f"{theirs}.output.LayerNorm.{part}"]
    state |= {key: value for key, value in encoder.state_dict().items() if key.startswith("head.")}
    encoder.load_state_dict(state)
    return encoder
