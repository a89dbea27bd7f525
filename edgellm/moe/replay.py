"""Policies of the expert pager replayed on routing traces: hit rates and bytes read, counted, without a model.

A hit is an expert that a visit needs and finds, other than by a prefetch for that very visit: a prefetch reads it too,
only earlier. Bytes count every read: for visits, whether kept or not, and for prefetches, right or wrong.
Uniformly random routing makes all policies equal, so only traces of real models, or skewed ones, say anything.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgellm import _kernels
from edgellm.moe.residency import Load, Residency
from edgellm.moe.routes import DECODE, PROMPT, Step, Trace

SEED = 2024


@dataclass(frozen=True, slots=True)
class Visit:
    """One layer of one step: the distinct experts that its rows chose."""

    layer: int
    experts: tuple[int, ...]
    counted: bool = True  # in the hit rate


class LoadLike(Protocol):
    """A Load, from Python or from the native code."""

    @property
    def expert(self) -> int: ...
    @property
    def slot(self) -> int: ...
    @property
    def evicted_layer(self) -> int: ...
    @property
    def evicted_expert(self) -> int: ...


class Policy(Protocol):
    """What `Residency` and the baselines have in common."""

    def visit(self, layer: int, experts: Sequence[int], /) -> Sequence[LoadLike]: ...
    def prefetch(self, layer: int, experts: Sequence[int], limit: int, /) -> Sequence[LoadLike]: ...


@dataclass(frozen=True, slots=True)
class LookAhead:
    """Look-ahead by one layer, simulated: each expert that the next visit needs is predicted with `recall`.

    In place of every one that is missed stands a wrong one, drawn at random. At most `limit` predicted experts a visit
    are read ahead.
    """

    recall: float
    limit: int

    def predict(self, coming: Visit, experts: int, draw: random.Random) -> list[int]:
        """The experts predicted for `coming`, of as many as `experts`."""
        right = [expert for expert in coming.experts if draw.random() < self.recall]
        others = [expert for expert in range(experts) if expert not in coming.experts]
        return right + draw.sample(others, min(len(coming.experts) - len(right), len(others)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replay counted."""

    uses: int
    hits: int
    ahead: int  # uses that were no hits, but had been read by the look-ahead
    read_bytes: int  # of all visits, counted in the hit rate or not

    @property
    def hit_rate(self) -> float:
        """Hits in parts of the uses; 1 if there were none."""
        return self.hits / self.uses if self.uses else 1.0


def visits_of(steps: Sequence[Step], *, rows: int = 1, counted: bool = True) -> list[Visit]:
    """The visits of `steps` when `rows` of them are computed together, as prompts are."""
    visits = []
    for start in range(0, len(steps), rows):
        for layer in range(len(steps[start].experts)):
            union = dict.fromkeys(expert for step in steps[start : start + rows] for expert in step.experts[layer])
            if union:
                visits.append(Visit(layer, tuple(union), counted))
    return visits


def cold_visits(trace: Trace) -> list[Visit]:
    """The decoded tokens, one a step, from an empty cache."""
    return visits_of(trace.phase(DECODE))


def warm_visits(trace: Trace, *, prompt_rows: int = 128) -> list[Visit]:
    """The prompt in chunks, which fills the cache but is not counted in the hit rate, then the decoded tokens."""
    return visits_of(trace.phase(PROMPT), rows=prompt_rows, counted=False) + cold_visits(trace)


def replay(policy: Policy, visits: Sequence[Visit], trace: Trace, look_ahead: LookAhead | None = None) -> Outcome:
    """Lead `policy` through `visits`. Raises RuntimeError if it breaks a rule of residency."""
    experts, sizes = trace.shape.experts, trace.shape.expert_bytes
    draw = random.Random(SEED)  # noqa: S311 (a simulation)
    resident: set[int] = set()
    ahead: set[int] = set()  # read by a prefetch for a visit that is to come
    pinned: set[int] = set()
    uses = hits = in_time = read = 0
    for visit, coming in zip(visits, [*visits[1:], None], strict=True):
        first = visit.layer * experts
        needed = {first + expert for expert in visit.experts}
        pinned = needed
        found = needed & resident
        if visit.counted:
            uses += len(needed)
            hits += len(found - ahead)
            in_time += len(found & ahead)
        _apply(policy.visit(visit.layer, visit.experts), visit.layer, experts, resident, pinned)
        read += sizes[visit.layer] * len(needed - found)
        ahead = {number for number in ahead if number // experts != visit.layer}
        if look_ahead and coming:
            guess = look_ahead.predict(coming, experts, draw)
            loads = policy.prefetch(coming.layer, guess, look_ahead.limit)
            ahead |= _apply(loads, coming.layer, experts, resident, pinned)
            ahead &= resident
            read += sizes[coming.layer] * len(loads)
    return Outcome(uses, hits, in_time, read)


def _apply(loads: Sequence[LoadLike], layer: int, experts: int, resident: set[int], pinned: set[int]) -> set[int]:
    """Carry out `loads`; the numbers (layer * experts + expert) of what was loaded."""
    loaded = set()
    for load in loads:
        if load.evicted_layer >= 0:
            evicted = load.evicted_layer * experts + load.evicted_expert
            if evicted in pinned or evicted not in resident:
                raise RuntimeError(f"expert {load.evicted_expert} of layer {load.evicted_layer} cannot be evicted")
            resident.remove(evicted)
        number = layer * experts + load.expert
        if number in resident:
            raise RuntimeError(f"expert {load.expert} of layer {layer} lies in a slot already")
        resident.add(number)
        loaded.add(number)
    return loaded


class _Ranked(ABC):
    """A baseline: evicts the expert of the lowest rank that is not needed now; of equal ones that in the first slot.

    Without bypass: what is needed always gets a slot, as long as there are slots for it.
    """

    def __init__(self, experts: int, slots: int) -> None:
        self.experts = experts
        self._holds: list[int] = []
        self._slots = slots
        self._where: dict[int, int] = {}
        self._now = -1

    @abstractmethod
    def rank(self, number: int) -> float:
        """How much an expert (layer * experts + expert) is worth."""

    @abstractmethod
    def used(self, number: int) -> None:
        """The expert is needed in the visit `_now`."""

    def visit(self, layer: int, experts: Sequence[int], /) -> list[Load]:
        self._now += 1
        needed = [layer * self.experts + expert for expert in experts]
        for number in needed:
            self.used(number)
        missing = [number for number in needed if number not in self._where]
        free = range(len(self._holds), min(self._slots, len(self._holds) + len(missing)))
        self._holds += [-1] * len(free)
        slots = list(free)
        if len(slots) < len(missing):
            held = set(needed)
            worth = [(self.rank(n), slot) for slot, n in enumerate(self._holds) if n >= 0 and n not in held]
            slots += [slot for _, slot in sorted(worth)[: len(missing) - len(slots)]]
        return [self._fill(slot, number) for slot, number in zip(slots, missing, strict=False)]

    def prefetch(self, _layer: int, _experts: Sequence[int], _limit: int, /) -> list[Load]:
        return []

    def _fill(self, slot: int, number: int) -> Load:
        old = self._holds[slot]
        self._where.pop(old, None)
        self._holds[slot] = number
        self._where[number] = slot
        layer, expert = divmod(old, self.experts) if old >= 0 else (-1, -1)
        return Load(number % self.experts, slot, layer, expert)


class Lru(_Ranked):
    """Evicts the least recently used."""

    def __init__(self, experts: int, slots: int) -> None:
        super().__init__(experts, slots)
        self._last: dict[int, int] = {}

    def used(self, number: int) -> None:
        self._last[number] = self._now

    def rank(self, number: int) -> float:
        return self._last[number]


class Lfu(_Ranked):
    """Evicts the least often used, counted from the start, whether resident or not; of equal ones the least recent."""

    def __init__(self, experts: int, slots: int) -> None:
        super().__init__(experts, slots)
        self._count: dict[int, int] = {}
        self._last: dict[int, int] = {}

    def used(self, number: int) -> None:
        self._count[number] = self._count.get(number, 0) + 1
        self._last[number] = self._now

    def rank(self, number: int) -> float:
        return self._count[number] + self._last[number] / (self._now + 1)


class Belady(_Ranked):
    """Knows the future and evicts what is needed last: no policy without bypass hits more often."""

    def __init__(self, experts: int, slots: int, visits: Sequence[Visit]) -> None:
        super().__init__(experts, slots)
        self._times: dict[int, list[int]] = {}
        for time, visit in reversed(list(enumerate(visits))):
            for expert in visit.experts:
                self._times.setdefault(visit.layer * experts + expert, []).append(time)

    def used(self, number: int) -> None:
        self._times[number].pop()

    def rank(self, number: int) -> float:
        times = self._times[number]
        return -times[-1] if times else -float("inf")


def policies(
    trace: Trace, visits: Sequence[Visit], slots: int, *, native: bool
) -> dict[str, tuple[Callable[[], Policy], bool]]:
    """Every policy by name, with one pool of `slots` for all layers; and whether it is shown the look-ahead."""
    layers, experts = trace.shape.layers, trace.shape.experts
    kind = _kernels.Residency if native else Residency

    def ours() -> Policy:
        return kind(layers, experts, pools=[0] * layers, slots=[slots])

    return {
        "lru": (lambda: Lru(experts, slots), False),
        "lfu": (lambda: Lfu(experts, slots), False),
        "ours": (ours, False),
        "ours+ahead": (ours, True),
        "belady": (lambda: Belady(experts, slots, visits), False),
    }
