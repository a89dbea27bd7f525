"""Measures how a mixture of experts routes a text: how alike, how foreseeable, and what caches would make of it."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.engine.threads import default_threads
from tests.support.graph_tap import GraphTap

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

ROUTER_INPUTS = {"qwen3moe": "ffn_norm", "olmoe": "ffn_norm", "glm4moe": "post_attn_norm"}
"""The node that a router reads, by architecture."""
CACHE_SHARES = (0.12, 0.24, 0.48)
_ROWS = 128  # of a step


@dataclass(frozen=True, slots=True)
class Routes:
    """What was chosen for one text."""

    chosen: Ints  # (layers, tokens, k) expert numbers
    guessed: Ints  # (layers - 1, tokens, k), for the layers from the second on: by their routers from the input before
    experts: int


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """Shares from 0 to 1."""

    overlap: float  # of a token's experts that the token before used too
    look_ahead_recall: float  # of a layer's experts that its router names from the input of the layer before
    hot_list_recall: float  # of a layer's experts that are among its k most used ones
    used: float  # of all experts that were used at all
    lru_hits: dict[float, float]  # by the share of all experts that a cache holds
    belady_hits: dict[float, float]  # the most that any policy can reach


def record_routes(path: Path, text: str, tokens: int) -> Routes:
    """The experts that the first `tokens` tokens of `text` are sent to. `path` is a file of one of ROUTER_INPUTS."""
    routers, architecture = _routers(path)
    source = ROUTER_INPUTS[architecture]
    model, tap = Model(path), GraphTap(["ffn_moe_topk", source])
    context = Context(model, ContextParams(tokens, 1, _ROWS, _ROWS, default_threads(), eval_callback=tap.callback))
    ids = model.vocab.tokenize(text, add_special=False, parse_special=False)[:tokens]
    batch = Batch(_ROWS)
    for start in range(0, len(ids), _ROWS):
        batch.clear()
        batch.extend(part := ids[start : start + _ROWS], start, 0, outputs=len(part))  # llama.cpp drops rows without
        context.decode(batch)
    seen = tap.take()
    context.close()
    model.close()
    layers = sorted(routers)
    chosen = np.stack([seen[f"ffn_moe_topk-{layer}"] for layer in layers])
    guessed = [
        _top(seen[f"{source}-{before}"] @ routers[layer].T, chosen.shape[2])
        for before, layer in itertools.pairwise(layers)
    ]
    return Routes(chosen, np.stack(guessed), len(routers[layers[0]]))


def _routers(path: Path) -> tuple[dict[int, Floats], str]:
    """Layer -> its router, (experts, width), and the architecture."""
    reader = gguf.GGUFReader(path)
    parts = {tensor.name: tensor for tensor in reader.tensors if tensor.name.endswith("ffn_gate_inp.weight")}
    routers = {int(name.split(".")[1]): np.array(tensor.data, np.float32) for name, tensor in parts.items()}
    return routers, str(reader.fields["general.architecture"].contents())


def _top(scores: Floats, k: int) -> Ints:
    return np.argpartition(-scores, k - 1, axis=1)[:, :k].astype(np.int32)


def _recall(guess: Ints, truth: Ints) -> float:
    """Mean share of the members of each row of `truth` that are in the same row of `guess`, (..., k) both."""
    return float((truth[..., :, None] == guess[..., None, :]).any(-1).mean())


def routing_stats(routes: Routes) -> RoutingStats:
    """Statistics of the whole text; the caches start empty."""
    chosen = routes.chosen
    layers, _, k = chosen.shape
    counts = np.stack([np.bincount(layer.ravel(), minlength=routes.experts) for layer in chosen])  # (layers, experts)
    hot = np.broadcast_to(_top(counts.astype(np.float32), k)[:, None], chosen.shape)
    accesses = (chosen + routes.experts * np.arange(layers)[:, None, None]).swapaxes(0, 1).ravel().tolist()
    cells = {share: round(share * layers * routes.experts) for share in CACHE_SHARES}
    return RoutingStats(
        overlap=_recall(chosen[:, :-1], chosen[:, 1:]),
        look_ahead_recall=_recall(routes.guessed, chosen[1:]),
        hot_list_recall=_recall(hot, chosen),
        used=float((counts > 0).mean()),
        lru_hits={share: lru_hits(accesses, count) for share, count in cells.items()},
        belady_hits={share: belady_hits(accesses, count) for share, count in cells.items()},
    )


def lru_hits(accesses: Sequence[int], cells: int) -> float:
    """Share of accesses that find their number among the `cells` most recently used ones."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number in accesses:
        if number in cache:
            hits += 1
            cache.move_to_end(number)
        else:
            cache[number] = None
            if len(cache) > cells:
                cache.popitem(last=False)
    return hits / len(accesses)


def belady_hits(accesses: Sequence[int], cells: int) -> float:
    """The most hits of a cache that must take in what it is asked for: it drops what is needed last (Belady 1966)."""
    uses: dict[int, list[int]] = defaultdict(list)
    for time in range(len(accesses) - 1, -1, -1):
        uses[accesses[time]].append(time)
    cached: set[int] = set()
    latest: list[tuple[int, int]] = []  # (-next use, number), with outdated entries
    hits = 0
    for number in accesses:
        uses[number].pop()
        if number in cached:
            hits += 1
        elif len(cached) == cells:
            cached.remove(_needed_last(latest, cached, uses, len(accesses)))
        cached.add(number)
        heapq.heappush(latest, (-_next(uses[number], len(accesses)), number))
    return hits / len(accesses)


def _next(times: list[int], never: int) -> int:
    return times[-1] if times else never


def _needed_last(latest: list[tuple[int, int]], cached: set[int], uses: dict[int, list[int]], never: int) -> int:
    while True:
        time, number = heapq.heappop(latest)
        if number in cached and -time == _next(uses[number], never):
            return number


def print_stats(stats: RoutingStats, k: int, experts: int, out: Callable[[str], Any] = print) -> None:
    """A table of a few lines."""
    out(f"overlap of consecutive tokens  {stats.overlap:5.2f}  (random: {k / experts:.2f})")
    out(f"look-ahead recall, one layer   {stats.look_ahead_recall:5.2f}  (hot list: {stats.hot_list_recall:.2f})")
    out(f"experts used at all            {stats.used:5.2f}")
    for share in CACHE_SHARES:
        hits = f"{100 * stats.lru_hits[share]:5.1f}  Belady {100 * stats.belady_hits[share]:5.1f}"
        out(f"hit % with {100 * share:.0f} % cached: LRU {hits}")
