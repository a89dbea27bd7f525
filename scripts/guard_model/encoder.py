"""The encoder: the first layers of a pretrained BERT, and one logit for each output.

The late outputs read the first token's state after the last layer, and of the states before it means and highest
values. So the last layer computes one token alone, which is a sixth of a layer; a mean is what the pretraining of
MiniLM put its meaning in (Reimers and Gurevych 2019, section 3).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from guard_model.encoding import OUTPUTS, WINDOW

HEADS = 12
SPAN = 32  # tokens: a request with what qualifies it
_LEAST = 0.75  # of a span must be there: less of a request may leave out why it is harmless
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
    """Embeddings and layers, with two heads: an early one after the first layers, and a late one after all.

    Most texts are plainly harmless, and the early head is enough to see it: the layers after it are then not computed
    (Teerapittayanon et al. 2016, "BranchyNet"). Each head is two dense layers with a logit for each of OUTPUTS, applied
    to every span of SPAN tokens and to the whole window, of which the highest logit counts: whatever stands beside a
    request, one span holds most of it and little else (multiple-instance learning).
    """

    def __init__(self, vocabulary: int, width: int, inner: int, layers: int, early: int, dropout: float = 0.1) -> None:
        """`early`: layers before the early head, fewer than `layers`."""
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(WINDOW, width))
        self.norm = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, inner, dropout) for _ in range(layers))
        self.early = early
        self.early_head = _head(2 * width, width, dropout)
        self.head = _head(3 * width, width, dropout)

    def first(self, ids: torch.Tensor, seen: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`ids`: (windows, tokens), at most WINDOW tokens. `seen`: the same shape, false for padding; None: all tokens
        count. The states after the early layers, (windows, tokens, width), and the early logits, (windows, outputs)."""
        x = self.dropout(self.norm(self.words(ids) + self.positions[: ids.shape[1]]))
        for layer in self.layers[: self.early]:
            x = layer(x, _wide(seen), first=False)
        return x, self.early_head(_pooled(x, seen)).amax(1)

    def rest(self, x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """The late logits, of the states of `first`."""
        for layer in self.layers[self.early : -1]:
            x = layer(x, _wide(seen), first=False)
        token = self.layers[-1](x, _wide(seen), first=True)
        pooled = _pooled(x, seen)
        return self.head(torch.cat([token.expand(-1, pooled.shape[1], -1), pooled], dim=-1)).amax(1)

    def forward(self, ids: torch.Tensor, seen: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Early and late logits."""
        x, early = self.first(ids, seen)
        return early, self.rest(x, seen)


def _head(inputs: int, width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, len(OUTPUTS)))


def _wide(seen: torch.Tensor | None) -> torch.Tensor | None:
    return None if seen is None else seen[:, None, None, :]


def _pooled(x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """The mean and the highest values over the tokens of each span and of the window, (windows, spans, 2 * width). For
    spans that are not whole enough the window stands in."""
    along = x.transpose(1, 2)
    steps = {"kernel_size": SPAN, "stride": SPAN // 2, "padding": SPAN // 2}
    counted = torch.ones_like(along[:, :1]) if seen is None else seen[:, None, :].to(x.dtype)
    # Zeros beside the text are counted, and taken out again by their number, whether they are padding or not there.
    number = functional.avg_pool1d(counted, **steps)
    means = functional.avg_pool1d(along * counted, **steps) / number.clamp(min=1 / SPAN)
    hidden = along if seen is None else along.masked_fill(~seen[:, None, :], torch.finfo(x.dtype).min)
    highest = functional.max_pool1d(hidden, **steps)
    mean, most = (along * counted).sum(2, keepdim=True) / counted.sum(2, keepdim=True), hidden.amax(2, keepdim=True)
    partial = number < _LEAST
    means, highest = torch.where(partial, mean, means), torch.where(partial, most, highest)
    whole = torch.cat([mean, most], dim=1)
    return torch.cat([whole, torch.cat([means, highest], dim=1)], dim=2).transpose(1, 2)


def pretrained(file: Path, layers: int, early: int) -> Encoder:
    """The first `layers` layers of a BERT in `file` (model.safetensors, names as in Hugging Face's BertModel). The
    outputs start at random, by torch's seed."""
    found = {key.removeprefix("bert."): value.float() for key, value in load_file(file).items()}
    words = found["embeddings.word_embeddings.weight"]
    inner = found["encoder.layer.0.intermediate.dense.weight"].shape[0]
    encoder = Encoder(words.shape[0], words.shape[1], inner, layers, early)
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
    state |= {key: value for key, value in encoder.state_dict().items() if "head." in key}
    encoder.load_state_dict(state)
    return encoder
