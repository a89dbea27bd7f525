"""What training a scheme will cost: private memory and arithmetic, known before anything is computed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from edgellm.tune.architecture import TARGETS, Architecture, matrix_shape
from edgellm.tune.scheme import Site

PROCESS_BYTES = 280 << 20
"""The interpreter with torch and llama.cpp's vocabulary, threads and what the allocator keeps; measured."""

LOGITS_BYTES = 96 << 20
"""What the logits of one chunk of tokens may take, about (edgellm/tune/loss.py)."""

SHORT = 512
"""Sequences of so many tokens keep their attention's weights for backward; longer ones do not."""

QUERIES = 128
"""Tokens that look for keys together (edgellm/tune/attention.py)."""

_RECOMPUTED = 1.1  # by which the whole exceeds what is asked for where forward passes are done again; measured
_LOGITS_COPIES = 1.2  # logits, and the product of a block of the output matrix
_EXPANDED = 3  # matrices of the widest kind, expanded at a time, with their products


@dataclass(frozen=True, slots=True)
class Setting:
    """How a scheme is trained."""

    rank: int
    pack_tokens: int
    longest: int  # tokens of a sequence
    item_bytes: int  # of a number in a product: 2 or 4
    recompute: bool


def parameters(shape: Architecture, sites: Collection[Site], rank: int) -> int:
    """Numbers that are trained."""
    return sum(rank * sum(matrix_shape(shape, site.tensor)) for site in sites)


def memory_bytes(shape: Architecture, sites: Collection[Site], setting: Setting) -> int:
    """About the most private memory of the process where allocation is thrifty (own_process.py), else it is some more.
    Base weights are mapped from their file and do not count."""
    depth = shape.layers - min(site.layer for site in sites)
    layer = _layer_bytes(shape, setting)
    stream = 4 * shape.width * setting.pack_tokens
    kept = depth * stream + layer if setting.recompute else depth * layer
    widest = max(shape.hidden, shape.heads * shape.head_width) * shape.width
    working = _EXPANDED * widest * setting.item_bytes + 4 * stream + _prefix_bytes(shape, setting)
    adapter = 16 * parameters(shape, sites, setting.rank)  # the numbers, their gradients, two moments
    whole = PROCESS_BYTES + kept + working + adapter + int(_LOGITS_COPIES * LOGITS_BYTES)
    return int(_RECOMPUTED * whole) if setting.recompute else whole


def _layer_bytes(shape: Architecture, setting: Setting) -> int:
    """What a layer keeps between its forward and its backward pass."""
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    floats = 2 * shape.width  # the stream before attention and before the feed-forward part
    items = 2 * shape.width + 2 * queries + 2 * keys + 3 * shape.hidden + len(TARGETS) * setting.rank
    items += shape.heads * (min(setting.longest, SHORT) + QUERIES) // 2  # attention's weights, on average over tokens
    return setting.pack_tokens * (4 * floats + setting.item_bytes * items)


def _prefix_bytes(shape: Architecture, setting: Setting) -> int:
    """A layer's forward pass without a graph."""
    return setting.pack_tokens * (8 * shape.width + setting.item_bytes * 3 * shape.hidden)


def layer_work(shape: Architecture) -> int:
    """Multiply-adds of a layer's matrices for one token."""
    return sum(columns * rows for columns, rows in (matrix_shape(shape, name) for name in TARGETS))


def step_work(shape: Architecture, sites: Collection[Site], *, answer_share: float, recompute: bool) -> float:
    """Multiply-adds for one token in a later epoch, whose prefix is cached: forward and backward through the layers
    from the lowest trained one, and the output matrix for the tokens of answers."""
    depth = shape.layers - min(site.layer for site in sites)
    passes = 3 if recompute else 2
    return passes * depth * layer_work(shape) + 2 * answer_share * shape.vocabulary * shape.width


def prefix_work(shape: Architecture, sites: Collection[Site]) -> float:
    """Multiply-adds for one token of the first epoch below the lowest trained layer."""
    return min(site.layer for site in sites) * float(layer_work(shape))
