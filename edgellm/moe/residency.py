"""Which expert lies in which slot: the policy of the expert pager, in plain Python.

Belady's rule (1966, "A study of replacement algorithms for a virtual-storage computer") evicts what is used furthest in
the future. The future is not known, so every expert has an *estimate* of when it is used next, in visits:

    due = next visit of its layer + (1 - p) / p cycles          p: probability that a visit of the layer uses it

where a cycle is one visit of each layer. The expert with the largest `due` is evicted. An expert of a layer that has
just run is a whole cycle away, one of the coming layer is not; in a cyclic scan (a long prompt in chunks: p = 1) the
furthest goes, where least-recently-used would always evict what is needed next. p is a weighted sum of three running
averages of "used or not" (the last few visits, some twenty, some hundred) and of a floor for experts not yet seen. How
much use in the very last visit says differs most from model to model, so there p is corrected by what was observed.

kernels/residency.cpp is the same policy, and must take the same decisions bit for bit: float64 everywhere, only + - * /
and comparisons, in the order written here. edgellm/moe/replay.py measures it against others on traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Rates of the three running averages, and their weights in p. Found on three traces (scripts/replay_routes), where the
# optimum is flat: recent use dominates, the long memory keeps experts that are often used apart from those seen once.
RATES = (0.6, 0.05, 0.01)
WEIGHTS = (0.25, 0.35, 0.4)
# An average starts as the plain mean over its visits and this many without use, so that it is sound from the first.
START_VISITS = 1.0
# The floor of p, in parts of the layer's usual share of used experts: not seen is not the same as never used.
FLOOR = 0.02
# The least p, so that no expert is due after the end of days.
LEAST = 0.001
# The same for predicted experts: one that may be needed in a moment is kept even if it would not be for long.
PREDICTED_LEAST = 0.05
# How much of what look-ahead promised came true, before it was seen: used ones of 100 predicted, and of 100 others.
PREDICTED_USED = 80.0
OTHERS_USED = 1.0
PRIOR_EXPERTS = 100.0
# With every visit that adds to it, evidence falls back by this part towards what it was before.
EVIDENCE_LOSS = 1.0 / 1024.0
# Uses that experts of the visit before were to have, and had, before any was seen: p is taken to be right about them.
PRIOR_REPEATS = 100.0


@dataclass(frozen=True, slots=True)
class Load:
    """`expert` (of the layer that was asked about) is to be read into `slot` of its layer's pool.

    `evicted_expert` of `evicted_layer` lay there until now; both are -1 if the slot was free.
    """

    expert: int
    slot: int
    evicted_layer: int
    evicted_expert: int


class Residency:
    """Slots of experts: who lies where, and who goes when room is needed. Not thread-safe: the caller locks.

    `pools[layer]` is the pool that the layer's experts lie in, `slots[pool]` how many experts that holds: any number
    from 0 to that of the experts that belong there. Layers are visited in cyclic order; one left out is expected
    a cycle later. All methods raise ValueError for a layer, expert, pool or slot that is not there, and for an expert
    named twice; nothing has changed then.
    """

    def __init__(self, layers: int, experts: int, *, pools: Sequence[int], slots: Sequence[int]) -> None:
        if layers < 1 or experts < 1:
            raise ValueError("there must be a layer and an expert")
        if len(pools) != layers or any(not 0 <= pool < len(slots) for pool in pools):
            raise ValueError("every layer needs one of the pools")
        for pool, count in enumerate(slots):
            if not 0 <= count <= experts * list(pools).count(pool):
                raise ValueError(f"pool {pool} cannot have {count} slots: 0 to the number of its experts")
        self.layers, self.experts = layers, experts
        self._pools = list(pools)
        count = layers * experts  # an expert's number is layer * experts + expert
        self._rates = [[0.0] * count for _ in RATES]
        self._due = [0.0] * count
        self._slot = [-1] * count
        self._share = [0.0] * layers  # of the layer's experts, used in a visit: a running mean
        self._visits = [0] * layers
        self._next = list(range(layers))  # when each layer is visited next
        self._last: list[list[int]] = [[] for _ in range(layers)]  # what each layer used last
        self._predicted: list[list[int] | None] = [None] * layers
        self._holds = [[-1] * size for size in slots]  # the number of the expert in each slot
        self._busy = [[False] * size for size in slots]
        self._free = [list(range(size - 1, -1, -1)) for size in slots]  # the last is taken first
        self._now = -1
        self._pinned: set[int] = set()
        self._expected, self._repeated = PRIOR_REPEATS, PRIOR_REPEATS
        self._promised, self._kept = PRIOR_EXPERTS, PREDICTED_USED  # predicted experts; the used ones of them
        self._others, self._missed = PRIOR_EXPERTS, OTHERS_USED  # the other experts; the used ones of them

    def visit(self, layer: int, experts: Sequence[int]) -> list[Load]:
        """`layer` needs `experts` now. Those not resident that get a slot; the rest are to be read but not kept.

        Until the next visit none of `experts` is evicted.
        """
        self._check(layer, experts)
        self._advance(layer)
        self._learn(layer, experts)
        first = layer * self.experts
        self._pinned = {first + expert for expert in experts}
        missing = [first + expert for expert in experts if self._slot[first + expert] < 0]
        pool = self._pools[layer]
        free = self._free[pool]
        slots = [free.pop() for _ in range(min(len(missing), len(free)))]
        slots += self._victims(pool, len(missing) - len(slots))
        return [self._fill(pool, slot, number) for slot, number in zip(slots, missing, strict=False)]

    def prefetch(self, layer: int, experts: Sequence[int], limit: int) -> list[Load]:
        """The next visit of `layer` will probably need `experts`, the most probable first: at most `limit` to read now.

        Replaces what was predicted for that visit before. Slots are taken only from experts that are due later.
        """
        self._check(layer, experts)
        if limit < 0:
            raise ValueError("a limit cannot be negative")
        self._predicted[layer] = list(experts)
        self._estimate(layer)
        first, pool = layer * self.experts, self._pools[layer]
        missing = [first + expert for expert in experts if self._slot[first + expert] < 0][:limit]
        free = self._free[pool]
        slots = [free.pop() for _ in range(min(len(missing), len(free)))]
        for slot, number in zip(self._victims(pool, len(missing) - len(slots)), missing[len(slots) :], strict=False):
            if not self._due[self._holds[pool][slot]] > self._due[number]:
                break
            slots.append(slot)
        return [self._fill(pool, slot, number) for slot, number in zip(slots, missing, strict=False)]

    def preload(self, layer: int, experts: Sequence[int]) -> list[Load]:
        """Free slots are filled with these, the first of them first; nothing is evicted.

        It says nothing about coming visits. Raises ValueError.
        """
        self._check(layer, experts)
        free = self._free[self._pools[layer]]
        missing = [expert for expert in experts if self.slot_of(layer, expert) < 0][: len(free)]
        return [self._fill(self._pools[layer], free.pop(), layer * self.experts + expert) for expert in missing]

    def slot_of(self, layer: int, expert: int) -> int:
        """The slot in which an expert lies, or is being read into; -1 if none."""
        self._check(layer, [expert])
        return self._slot[layer * self.experts + expert]

    def resident(self, layer: int) -> list[int]:
        """The layer's experts that have a slot, in the order of their numbers."""
        self._check(layer, [])
        return [expert for expert in range(self.experts) if self._slot[layer * self.experts + expert] >= 0]

    def set_busy(self, pool: int, slot: int, busy: bool) -> None:
        """A busy slot (being read into, or computed with) is not evicted."""
        if not (0 <= pool < len(self._busy) and 0 <= slot < len(self._busy[pool])):
            raise ValueError(f"there is no slot {slot} in pool {pool}")
        self._busy[pool][slot] = busy

    def forget(self, layer: int, expert: int) -> None:
        """The expert could not be read: its slot, no longer busy, is free again. Nothing happens if it has none."""
        slot = self.slot_of(layer, expert)
        if slot >= 0:
            pool = self._pools[layer]
            self._slot[layer * self.experts + expert] = -1
            self._holds[pool][slot] = -1
            self._busy[pool][slot] = False
            self._free[pool].append(slot)

    def _check(self, layer: int, experts: Sequence[int]) -> None:
        if not 0 <= layer < self.layers:
            raise ValueError(f"there is no layer {layer}")
        if any(not 0 <= expert < self.experts for expert in experts):
            raise ValueError(f"experts are numbered from 0 to {self.experts - 1}")
        if len(set(experts)) != len(experts):
            raise ValueError("an expert is named twice")

    def _advance(self, layer: int) -> None:
        """Move the clock to the visit of `layer`; layers left out on the way are expected a cycle later."""
        self._now += 1
        while self._now % self.layers != layer:
            self._postpone(self._now % self.layers)
            self._now += 1
        self._next[layer] = self._now + self.layers

    def _postpone(self, layer: int) -> None:
        self._next[layer] += self.layers
        self._predicted[layer] = None
        self._estimate(layer)

    def _learn(self, layer: int, experts: Sequence[int]) -> None:
        """Take one visit's uses into the averages, and estimate the layer's experts anew."""
        used = set(experts)
        self._judge_prediction(layer, used)
        self._judge_repeats(layer, used)
        self._last[layer] = list(experts)
        self._visits[layer] += 1
        mean = 1.0 / (self._visits[layer] + START_VISITS)
        first = layer * self.experts
        for rate, rates in zip(RATES, self._rates, strict=True):
            step = max(rate, mean)
            for expert in range(self.experts):
                old = rates[first + expert]
                rates[first + expert] = old + step * ((1.0 if expert in used else 0.0) - old)
        step = max(RATES[2], mean)
        self._share[layer] += step * (len(used) / self.experts - self._share[layer])
        self._predicted[layer] = None
        self._estimate(layer)

    def _judge_prediction(self, layer: int, used: set[int]) -> None:
        """Compare what look-ahead predicted for this visit with what it used."""
        predicted = self._predicted[layer]
        if predicted is None:
            return
        right = sum(expert in used for expert in predicted)
        self._promised += EVIDENCE_LOSS * (PRIOR_EXPERTS - self._promised) + len(predicted)
        self._kept += EVIDENCE_LOSS * (PREDICTED_USED - self._kept) + right
        self._others += EVIDENCE_LOSS * (PRIOR_EXPERTS - self._others) + (self.experts - len(predicted))
        self._missed += EVIDENCE_LOSS * (OTHERS_USED - self._missed) + (len(used) - right)

    def _judge_repeats(self, layer: int, used: set[int]) -> None:
        """Compare how many experts of the layer's last visit were to be used again with how many are.

        Visits of very different numbers of experts, a prompt's chunk and a token after it, say nothing.
        """
        last = self._last[layer]
        if not (len(used) <= 2 * len(last) and len(last) <= 2 * len(used)):
            return
        expected, repeated = 0.0, 0
        for expert in last:
            expected += self._probability(layer, expert)
            repeated += expert in used
        self._expected += EVIDENCE_LOSS * (PRIOR_REPEATS - self._expected) + expected
        self._repeated += EVIDENCE_LOSS * (PRIOR_REPEATS - self._repeated) + repeated

    def _probability(self, layer: int, expert: int) -> float:
        """That a visit of the layer uses the expert, as the averages have it."""
        fast, middle, slow = self._rates
        number, floor = layer * self.experts + expert, FLOOR * self._share[layer]
        p = WEIGHTS[0] * fast[number] + WEIGHTS[1] * middle[number] + WEIGHTS[2] * slow[number] + floor
        return min(p, 1.0)

    def _estimate(self, layer: int) -> None:
        """When the layer's experts are due.

        With a prediction q takes the place of p in the coming visit; for later ones p stands: (1 - q) / p cycles.
        """
        first, predicted = layer * self.experts, self._predicted[layer]
        coming, cycle = float(self._next[layer]), float(self.layers)
        correction = self._repeated / self._expected
        unlikely, likely = self._missed / self._others, self._kept / self._promised
        chances = [self._probability(layer, expert) for expert in range(self.experts)]
        for expert in self._last[layer]:
            chances[expert] = min(chances[expert] * correction, 1.0)
        for expert, p in enumerate(chances):
            q = p if predicted is None else unlikely
            self._due[first + expert] = coming + (1.0 - q) / max(p, LEAST) * cycle
        for expert in predicted or ():
            self._due[first + expert] = coming + (1.0 - likely) / max(chances[expert], PREDICTED_LEAST) * cycle

    def _victims(self, pool: int, count: int) -> list[int]:
        """At most `count` slots whose experts may be evicted, the furthest due first, of equal ones the first slot."""
        if count == 0:
            return []
        holds, busy = self._holds[pool], self._busy[pool]
        candidates = [
            (-self._due[number], slot)
            for slot, number in enumerate(holds)
            if number >= 0 and not busy[slot] and number not in self._pinned
        ]
        return [slot for _, slot in sorted(candidates)[:count]]

    def _fill(self, pool: int, slot: int, number: int) -> Load:
        old = self._holds[pool][slot]
        if old >= 0:
            self._slot[old] = -1
        self._holds[pool][slot] = number
        self._slot[number] = slot
        layer, expert = divmod(old, self.experts) if old >= 0 else (-1, -1)
        return Load(number % self.experts, slot, layer, expert)
