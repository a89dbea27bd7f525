"""How much training each matrix would help: a contribution analysis without training any of them.

PockEngine (arXiv 2310.17752, section 3) trains one layer at a time to learn what it is worth. Here one backward pass
through all layers gives an estimate for every matrix at once: at the start, where B is zero, an optimiser like Adam
moves each element of B by the sign of its gradient. What such a step gains to first order, measured on other examples
than those that gave the sign, is the sum over the elements of sign(g1) * g2: what is only noise comes to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgellm.tune.batches import Examples
from edgellm.tune.decoder import Decoder
from edgellm.tune.lora import Lora, LoraConfig
from edgellm.tune.loss import token_losses
from edgellm.tune.scheme import Site, every_site

TOKENS = 2048
"""Of the examples to look at."""

Gains = dict[Site, float]


@dataclass(frozen=True, slots=True)
class Contributions:
    """What an analysis found."""

    gains: Gains  # in nats per unit of learning rate, for all answer tokens looked at; may be below zero
    tokens: int  # that were looked at


def analyse(
    decoder: Decoder,
    examples: Examples,
    config: LoraConfig,
    *,
    pack_tokens: int,
    recompute: bool = True,
    tokens: int = TOKENS,
    seed: int = 0,
) -> Contributions:
    """The gain of every matrix. Looks at about `tokens` tokens of the examples, of pairs at the preferred answers.

    Memory is that of a pass over `pack_tokens` tokens: with `recompute` through one layer, else through all.
    """
    lora = Lora(decoder.shape, every_site(decoder.shape.layers), config, seed=seed)
    before, decoder.recompute = decoder.recompute, recompute
    found: list[dict[Site, Tensor]] = []
    seen = 0
    try:
        for half in _halves(examples, tokens):
            for members in examples.packs(half, pack_tokens):
                seen += _backward(decoder, lora, examples, members[:: examples.width])
            found.append({site: b.grad for site, (_, b) in lora.pairs.items() if b.grad is not None})
            for tensor in lora.parameters():
                tensor.grad = None
    finally:
        decoder.recompute = before
    first, second = found
    gains = {}
    for site in lora.pairs:  # both ways round: one half's noise is not the other's
        one, two = (half.get(site, torch.zeros(1)) for half in (first, second))
        gains[site] = float((one.sign() * two + two.sign() * one).sum())
    return Contributions(gains, seen)


def _halves(examples: Examples, tokens: int) -> tuple[list[int], list[int]]:
    """Two disjoint sets of examples, drawn from the whole file; of a file of one example, the same twice."""
    some: list[int] = []
    size = 0
    for number in np.random.default_rng(0).permutation(len(examples)):
        some.append(int(number))
        size += len(examples.sequences[some[-1] * examples.width].tokens)
        if size >= tokens and len(some) >= 2:
            break
    return some[::2], some[1::2] or some


def _backward(decoder: Decoder, lora: Lora, examples: Examples, members: Sequence[int]) -> int:
    """Adds up gradients; how many tokens these sequences have."""
    batch = examples.batch(members)
    stream = decoder.layers(decoder.embed(batch.packed), batch.packed, range(decoder.shape.layers), lora)
    losses = token_losses(decoder.normalise(stream[batch.places]), decoder.head, batch.targets).losses
    if len(losses):
        losses.sum().backward()
    return batch.tokens
