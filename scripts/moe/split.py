"""Splits a dense feed-forward layer into a shared expert, routed experts and a router, without training.

In the manner of MoEfication (arXiv 2110.01786, sections 3.2 and 3.3): neurons that are active together make an expert,
and a router foretells from the layer's input which experts will matter. The hottest neurons are shared by all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_ROUNDS = 12  # of k-means
_CLUSTER_TOKENS = 4096  # most tokens whose activations a neuron is compared by
_RIDGE = 1e-3  # of the mean variance of an input
_FLOOR = 1e-3  # of a token's mean contribution: the log of less is not told apart


@dataclass(frozen=True, slots=True)
class Layer:
    """A dense SwiGLU layer: down @ (silu(gate @ x) * (up @ x))."""

    gate: Floats  # (neurons, width)
    up: Floats  # (neurons, width)
    down: Floats  # (width, neurons)


@dataclass(frozen=True, slots=True)
class SplitShape:
    """How many neurons go where: shared + experts * expert_width is all of a layer's."""

    shared: int
    experts: int
    expert_width: int


@dataclass(frozen=True, slots=True)
class Split:
    """Neuron numbers, and the router. Logits are the centred log of what an expert would add to the output."""

    shared: Ints  # (shared,)
    experts: Ints  # (experts, expert_width)
    router: Floats  # (experts, width)


def split_layer(layer: Layer, inputs: Floats, shape: SplitShape, random: np.random.Generator) -> Split:
    """Splits `layer` by what it does with `inputs`, (tokens, width), which its norm has already scaled."""
    active = activations(layer, inputs)
    reach = np.linalg.norm(layer.down, axis=0)  # (neurons,)
    energy = np.square(active).mean(axis=0) * np.square(reach)
    order = np.argsort(-energy, kind="stable")
    shared, rest = np.sort(order[: shape.shared]), np.sort(order[shape.shared :])
    few = random.permutation(len(inputs))[:_CLUSTER_TOKENS]
    strength = np.abs(active[np.ix_(few, rest)]) * reach[rest]  # (tokens, neurons)
    experts = rest[balanced_clusters(strength.T, shape.experts, random)]
    target = _contributions(layer, active, experts)
    return Split(shared, experts, ridge(inputs, target))


def activations(layer: Layer, inputs: Floats) -> Floats:
    """(tokens, neurons)."""
    gate = inputs @ layer.gate.T
    gate /= 1 + np.exp(-np.clip(gate, -80, 80))
    gate *= inputs @ layer.up.T
    return gate


def balanced_clusters(points: Floats, clusters: int, random: np.random.Generator) -> Ints:
    """k-means by correlation with clusters of one size: (clusters, points / clusters) row numbers, each row sorted.

    `points` is (points, features). Assignment is greedy: the closest pair of a point and a cluster with room is next.
    """
    unit = points - points.mean(axis=1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True) + 1e-12
    centres = _first_centres(unit, clusters, random)
    members = np.empty((0, 0), np.int64)
    for _ in range(_ROUNDS):
        found = _assign(unit @ centres.T)
        if np.array_equal(found, members):
            break
        members = found
        centres = unit[members].mean(axis=1)
        centres /= np.linalg.norm(centres, axis=1, keepdims=True) + 1e-12
    return members


def _first_centres(unit: Floats, clusters: int, random: np.random.Generator) -> Floats:
    """Points far from each other: each drawn by its distance from those before (k-means++, Arthur and others 2007)."""
    chosen = [int(random.integers(len(unit)))]
    closest = unit @ unit[chosen[0]]
    while len(chosen) < clusters:
        distance = np.clip(1 - closest, 0, None).astype(np.float64)
        chosen.append(int(random.choice(len(unit), p=distance / distance.sum())))
        closest = np.maximum(closest, unit @ unit[chosen[-1]])
    return unit[chosen]


def _assign(closeness: Floats) -> Ints:
    """(points, clusters) -> (clusters, points / clusters): the greedy matching, best pair first."""
    points, clusters = closeness.shape
    room = points // clusters
    taken = np.zeros(points, bool)
    members: list[list[int]] = [[] for _ in range(clusters)]
    left = points
    for pair in np.argsort(-closeness, axis=None, kind="stable").tolist():
        point, cluster = divmod(pair, clusters)
        if not taken[point] and len(members[cluster]) < room:
            members[cluster].append(point)
            taken[point] = True
            left -= 1
            if not left:
                break
    return np.sort(np.array(members, np.int64), axis=1)


def _contributions(layer: Layer, active: Floats, experts: Ints) -> Floats:
    """Centred log of the norm of each expert's output, (tokens, experts)."""
    norms = np.stack([np.linalg.norm(active[:, own] @ layer.down[:, own].T, axis=1) for own in experts], axis=1)
    logs = np.log(norms + _FLOOR * norms.mean(axis=1, keepdims=True))
    return (logs - logs.mean(axis=1, keepdims=True)).astype(np.float32)


def ridge(inputs: Floats, targets: Floats) -> Floats:
    """The (targets, width) matrix W that minimises |inputs @ W.T - targets|^2 with a penalty on W."""
    inner = inputs.T.astype(np.float64) @ inputs
    inner[np.diag_indices_from(inner)] += _RIDGE * np.trace(inner) / len(inner)
    return np.linalg.solve(inner, inputs.T.astype(np.float64) @ targets).T.astype(np.float32)
