"""Low-rank adapters on chosen matrices of a decoder (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgellm.errors import ConfigError
from edgellm.tune.architecture import TARGETS, Architecture, matrix_shape
from edgellm.tune.defaults import ALPHA_RANKS, RANK
from edgellm.tune.scheme import Site


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Raises ConfigError for numbers that make no adapter."""

    rank: int = RANK
    alpha: float = ALPHA_RANKS * RANK
    rank_stabilised: bool = False  # divide by the root of the rank, not by the rank

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora rank must be at least 1, not {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"lora alpha must be a positive number, not {self.alpha}")

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class Lora:
    """Float32 pairs A (rank, in) and B (out, rank) for each site; B begins at zero, A as in PEFT."""

    def __init__(self, architecture: Architecture, sites: Iterable[Site], config: LoraConfig, *, seed: int = 0) -> None:
        """Raises ConfigError for no sites, or one that the model has not."""
        self.config = config
        self.architecture = architecture
        self.pairs: dict[Site, tuple[Tensor, Tensor]] = {}
        random = torch.Generator().manual_seed(seed)
        for site in sorted(set(sites)):
            if site.tensor not in TARGETS or not 0 <= site.layer < architecture.layers:
                raise ConfigError(f"the model has no matrix {site.name!r} to train")
            columns, rows = matrix_shape(architecture, site.tensor)
            bound = columns**-0.5  # kaiming_uniform_ with a = sqrt(5)
            a = (torch.rand(config.rank, columns, generator=random) * 2 - 1) * bound
            self.pairs[site] = (a.requires_grad_(), torch.zeros(rows, config.rank, requires_grad=True))
        if not self.pairs:
            raise ConfigError("an adapter needs at least one matrix to train")

    @property
    def lowest_layer(self) -> int:
        """Layers below it have no gradients."""
        return min(site.layer for site in self.pairs)

    def parameters(self) -> Iterator[Tensor]:
        """What is trained, in a fixed order: A, then B, site by site."""
        for pair in self.pairs.values():
            yield from pair
