"""Which experts of a model are stored with fewer bits, so that its perplexity rises by no more than is asked for.

After EdgeMoE's expert-wise bit widths (arXiv 2308.14352): experts differ in what narrowing them costs, so it is
measured, and those that are cheap for the bytes they save are narrowed first. Measuring every expert would take
thousands of runs. What is measured is a layer, or a few, at each width; its experts share the rise by how often they
are used times the squared error of their weights. That gives an order of steps; how many are taken is measured again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.errors import ConfigError, ModelUnsupportedError

Floats = npt.NDArray[np.float64]
Widths = npt.NDArray[np.uint8]
Measure = Callable[[Widths], float]
Progress = Callable[[int, int, str], None]

FULL = 0
"""The width of an expert that is stored as it is."""

MEASUREMENTS = 100
"""Most measurements, if nothing else is asked for."""

USAGE_FLOOR = 0.05
"""An expert counts as used at least this often, as a share of its layer's mean: that the text did not need it does not
make it free."""

_LEAST_RISE = 1e-12  # of a group: rises below zero are noise, and its experts still have an order
_PROBES = 2  # the base, and all steps


@dataclass(frozen=True, slots=True)
class Experts:
    """What there is to choose from. Raises ConfigError when made of what does not fit together."""

    bits: tuple[int, ...]  # (widths,): on offer beside the full width
    full_bytes: tuple[int, ...]  # (layers,): of one expert as it is
    narrow_bytes: tuple[tuple[int, ...], ...]  # (layers, widths): of one expert at each width
    errors: Floats  # (layers, experts, widths): squared error over squared norm of its weights
    usage: Floats  # (layers, experts): how many tokens used it

    def __post_init__(self) -> None:
        layers = len(self.full_bytes)
        shapes = self.usage.ndim == 2 and self.errors.shape == (*self.usage.shape, len(self.bits))
        if not shapes or len(self.usage) != layers or [len(row) for row in self.narrow_bytes] != [self.offers] * layers:
            raise ConfigError("the experts' sizes, errors and usage have different shapes")
        if not self.usage.size or not self.offers or len(set(self.bits)) != self.offers:
            raise ConfigError("there is nothing to choose from: no experts, or no widths that differ")
        if not all(0 < bits < 256 for bits in self.bits) or not _sound(self.errors) or not _sound(self.usage):
            raise ConfigError("widths must be positive, errors and usage numbers that are not negative")

    @property
    def offers(self) -> int:
        return len(self.bits)

    @property
    def saved_bytes(self) -> Floats:
        """(layers, widths): by one expert at each width."""
        return np.array(self.full_bytes, np.float64)[:, None] - np.array(self.narrow_bytes, np.float64)

    def bytes_of(self, widths: Widths) -> int:
        """Of all experts at these widths, (layers, experts)."""
        total = 0
        for layer, row in enumerate(widths.tolist()):
            sizes = {FULL: self.full_bytes[layer], **dict(zip(self.bits, self.narrow_bytes[layer], strict=True))}
            total += sum(sizes[bits] for bits in row)
        return total


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """What narrowing a group of layers costs. `rises[group, width]` is the rise of the log perplexity, as measured."""

    groups: tuple[range, ...]  # layers
    rises: Floats


@dataclass(frozen=True, slots=True)
class Choice:
    """The widths, and what comes of them."""

    widths: Widths  # (layers, experts); FULL, or bits
    base_perplexity: float
    perplexity: float  # with these widths, as measured
    full_bytes: int
    n_bytes: int
    sensitivities: Sensitivities
    measurements: int


def choose_widths(
    experts: Experts,
    measure: Measure,
    *,
    loss_target: float,
    measurements: int = MEASUREMENTS,
    progress: Progress | None = None,
) -> Choice:
    """The widths that save most bytes while the perplexity is at most `loss_target` (0.02: 2 %) above the model's own.

    `measure` is given widths, (layers, experts), and returns the perplexity with them; what is no finite number counts
    as beyond the target. It is called at most `measurements` times; layers share a measurement where there are too
    many. `progress` is told how many are done, of at most how many, and what the next is for.

    Raises ConfigError, and ModelUnsupportedError if the model's own perplexity is not a finite number.
    """
    layers, each = experts.usage.shape
    search = _PROBES + math.ceil(math.log2(layers * each * experts.offers + 1))
    if not (math.isfinite(loss_target) and loss_target >= 0):
        raise ConfigError("the loss to aim at must be a number that is not negative")
    if measurements < search + experts.offers:
        raise ConfigError(f"choosing widths takes at least {search + experts.offers} measurements")
    groups = min(layers, (measurements - search) // experts.offers)
    ruler = _Ruler(measure, groups * experts.offers + search, progress)
    base = ruler.log_perplexity(np.zeros((layers, each), np.uint8), "the model as it is")
    if not math.isfinite(base):
        raise ModelUnsupportedError("the model's perplexity is not a number: nothing can be compared with it")
    found = _sensitivities(experts, groups, base, ruler)
    steps = _order(experts, _rises(experts, found))
    widths, reached = _most_steps(experts, steps, base, loss_target, ruler)
    return Choice(
        widths=widths,
        base_perplexity=math.exp(base),
        perplexity=math.exp(reached),
        full_bytes=experts.bytes_of(np.zeros_like(widths)),
        n_bytes=experts.bytes_of(widths),
        sensitivities=found,
        measurements=ruler.done,
    )


class _Ruler:
    """Measures, counts and tells."""

    def __init__(self, measure: Measure, most: int, progress: Progress | None) -> None:
        self._measure, self._most, self._progress = measure, most, progress
        self.done = 0

    def log_perplexity(self, widths: Widths, what: str) -> float:
        """Infinite where the perplexity is not a positive finite number."""
        if self._progress:
            self._progress(self.done, self._most, what)
        value = self._measure(widths.copy())
        self.done += 1
        return math.log(value) if math.isfinite(value) and value > 0 else math.inf


def _sensitivities(experts: Experts, groups: int, base: float, ruler: _Ruler) -> Sensitivities:
    layers = experts.usage.shape[0]
    ends = [round(layers * number / groups) for number in range(groups + 1)]
    runs = tuple(range(first, end) for first, end in itertools.pairwise(ends))
    rises = np.zeros((groups, experts.offers))
    for number, run in enumerate(runs):
        where = f"layer {run[0] + 1}" if len(run) == 1 else f"layers {run[0] + 1} to {run[-1] + 1}"
        for offer, bits in enumerate(experts.bits):
            widths = np.zeros(experts.usage.shape, np.uint8)
            widths[run.start : run.stop] = bits
            rises[number, offer] = ruler.log_perplexity(widths, f"{where} at {bits} bits") - base
    return Sensitivities(runs, rises)


def _rises(experts: Experts, found: Sensitivities) -> Floats:
    """(layers, experts, widths): what each expert is expected to cost; infinite where its group's was no number."""
    mean = experts.usage.mean(1, keepdims=True)
    usage = np.where(mean > 0, np.maximum(experts.usage, USAGE_FLOOR * mean), 1.0)
    harm = usage[..., None] * experts.errors
    rises = np.zeros_like(harm)
    for run, measured in zip(found.groups, found.rises, strict=True):
        part = harm[run.start : run.stop]
        total = part.sum((0, 1))
        share = np.divide(part, total, out=np.zeros_like(part), where=total > 0)
        known = np.isfinite(measured)
        rises[run.start : run.stop] = np.where(known, share * np.where(known, measured, 0).clip(_LEAST_RISE), np.inf)
    return rises


@dataclass(frozen=True, slots=True)
class _Step:
    """An expert is narrowed, from the full width or from another."""

    gain: float  # bytes for each unit of the rise that is expected
    layer: int
    expert: int
    bits: int


def _order(experts: Experts, rises: Floats) -> list[_Step]:
    """All steps that may be worth taking, the best first. An expert's own come in the order of falling width."""
    saved = experts.saved_bytes
    steps = [
        step
        for layer in range(rises.shape[0])
        for expert in range(rises.shape[1])
        for step in _steps_of(layer, expert, experts.bits, saved[layer], rises[layer, expert])
    ]
    return sorted(steps, key=lambda step: -step.gain)  # stable: an expert's steps have falling gains


def _steps_of(layer: int, expert: int, bits: tuple[int, ...], saved: Floats, rises: Floats) -> list[_Step]:
    """The steps along the convex hull of (rise, bytes saved), which begins at nothing for nothing."""
    hull = [(0.0, 0.0, FULL)]
    points = sorted((float(s), float(r), b) for s, r, b in zip(saved, rises, bits, strict=True))
    for s, r, b in points:
        if not math.isfinite(r):
            continue
        while len(hull) > 1 and _gain(hull[-1], (s, r, b)) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        if s > hull[-1][0]:
            hull.append((s, r, b))
    return [_Step(_gain(before, after), layer, expert, after[2]) for before, after in itertools.pairwise(hull)]


def _gain(before: tuple[float, float, int], after: tuple[float, float, int]) -> float:
    """Bytes saved for each unit of rise; infinite where there is none."""
    rise = after[1] - before[1]
    return (after[0] - before[0]) / rise if rise > 0 else math.inf


def _most_steps(
    experts: Experts, steps: list[_Step], base: float, loss_target: float, ruler: _Ruler
) -> tuple[Widths, float]:
    """The widths after the most steps that keep to the target, by bisection, and their log perplexity.

    What is returned was measured, and kept to it. Where the perplexity does not rise with every step, more steps might.
    """
    limit = base + math.log1p(loss_target)
    taken, beyond = 0, len(steps) + 1
    reached, probe = base, len(steps)
    while beyond - taken > 1:
        value = ruler.log_perplexity(_after(experts, steps[:probe]), f"{probe} of {len(steps)} steps")
        if value <= limit:
            taken, reached = probe, value
        else:
            beyond = probe
        probe = (taken + beyond) // 2
    return _after(experts, steps[:taken]), reached


def _after(experts: Experts, steps: list[_Step]) -> Widths:
    widths = np.zeros(experts.usage.shape, np.uint8)
    for step in steps:
        widths[step.layer, step.expert] = step.bits
    return widths


def _sound(values: Floats) -> bool:
    return bool(np.isfinite(values).all() and (values >= 0).all())
