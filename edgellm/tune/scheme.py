"""Which matrices are trained: a scheme as people write it, and the sites it stands for.

none                       every matrix of every layer
top-8                      every matrix of the topmost 8 layers
20-29                      every matrix of layers 20 to 29, counted from 0
20-29:attn_v,ffn_down      only these matrices of them
20-24:attn_v+25-29         several parts, joined by +
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from edgellm.errors import ConfigError
from edgellm.tune.architecture import TARGETS

_PART = re.compile(r"(?:top-(?P<top>\d{1,5})|(?P<low>\d{1,5})(?:-(?P<high>\d{1,5}))?)(?::(?P<names>[a-z_,]+))?")
_LENGTH_MAX = 10_000


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """A matrix that is trained: `tensor` is one of TARGETS."""

    layer: int
    tensor: str

    @property
    def name(self) -> str:
        """The matrix's name in a GGUF file."""
        return f"blk.{self.layer}.{self.tensor}.weight"


def every_site(layers: int, lowest: int = 0) -> tuple[Site, ...]:
    """All matrices of the layers from `lowest` up."""
    return tuple(Site(layer, name) for layer in range(lowest, layers) for name in TARGETS)


def check_scheme(text: str) -> None:
    """Raises ConfigError for what is no scheme of any model; "auto" is one."""
    if text not in ("auto", "none"):
        _parts(text)


def parse_scheme(text: str, layers: int) -> tuple[Site, ...]:
    """The sites of a scheme in a model of so many layers, in order. Raises ConfigError; "auto" is not known here."""
    if text == "none":
        return every_site(layers)
    sites: set[Site] = set()
    for match in _parts(text):
        if match["top"]:
            low, high = max(0, layers - int(match["top"])), layers - 1
        else:
            low, high = int(match["low"]), int(match["high"] or match["low"])
        if not low <= high < layers:
            raise ConfigError(f"sparsity {match[0]!r}: the model has layers 0 to {layers - 1}")
        names = match["names"].split(",") if match["names"] else TARGETS
        sites.update(Site(layer, name) for layer in range(low, high + 1) for name in names)
    return tuple(sorted(sites))


def scheme_text(sites: Iterable[Site], layers: int) -> str:
    """How a scheme of these sites is written, shortest where a whole top is meant."""
    chosen = set(sites)
    if chosen == set(every_site(layers)):
        return "none"
    lowest = min(site.layer for site in chosen)
    if chosen == set(every_site(layers, lowest)):
        return f"top-{layers - lowest}"
    of_layer = {
        layer: tuple(name for name in TARGETS if Site(layer, name) in chosen)
        for layer in sorted({site.layer for site in chosen})
    }
    parts = []
    # Neighbouring layers with the same matrices go into one part.
    for (names, _), run in groupby(enumerate(of_layer), key=lambda pair: (of_layer[pair[1]], pair[1] - pair[0])):
        run_layers = [layer for _, layer in run]
        span = str(run_layers[0]) if len(run_layers) == 1 else f"{run_layers[0]}-{run_layers[-1]}"
        parts.append(span if names == TARGETS else f"{span}:{','.join(names)}")
    return "+".join(parts)


def _parts(text: str) -> list[re.Match[str]]:
    found = []
    for part in text[:_LENGTH_MAX].split("+"):
        match = _PART.fullmatch(part)
        if match is None or match["top"] == "0":
            raise ConfigError(f"sparsity {part[:80]!r}: write auto, none, top-8, 20-29 or 20-29:attn_v,ffn_down")
        names = match["names"].split(",") if match["names"] else []
        if unknown := sorted(set(names) - set(TARGETS)):
            raise ConfigError(f"sparsity: no matrix is called {unknown[0]!r}; there are {', '.join(TARGETS)}")
        found.append(match)
    return found
