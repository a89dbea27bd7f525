"""Which scheme is trained: the most gain for the time, within the memory that there is.

Sparse back-propagation pays by depth: below the lowest trained layer nothing is stored and, from the second epoch on,
nothing computed. So candidates are tops of the model of growing depth, each once with all its matrices and once without
those that would hardly help (PockEngine, arXiv 2310.17752, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgellm.errors import ConfigError
from edgellm.tune.architecture import Architecture
from edgellm.tune.cost import Setting, memory_bytes, parameters, prefix_work, step_work
from edgellm.tune.scheme import Site, every_site, scheme_text

ENOUGH = 0.75
"""Of the whole gain: deeper schemes cost more than they bring (docs/benchmarks.md has the measurements)."""

_SURE = 1.08  # an estimate of memory is out by so much at most
_KEPT = 0.97  # of a top's gain, when its idlest matrices are left out
_DEPTHS = (1 / 15, 1 / 10, 1 / 7, 1 / 5, 1 / 4, 1 / 3, 0.4, 1 / 2, 2 / 3, 0.8, 1.0)  # of the layers
_PACKS = (2048, 1024, 512, 256)  # tokens of a pack, tried from the most; never less than the longest example


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scheme, and what it costs and brings."""

    sites: tuple[Site, ...]
    text: str
    setting: Setting
    parameters: int
    memory_bytes: int
    work: float  # multiply-adds for all tokens of all epochs
    share: float  # of the whole gain


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be trained, as far as costs depend on it."""

    tokens: int  # of an epoch
    answer_share: float  # of the tokens
    longest: int  # tokens of an example
    epochs: int


def candidates(
    shape: Architecture, gains: Mapping[Site, float], load: Load, rank: int, item_bytes: int, budget_bytes: int | None
) -> list[Candidate]:
    """All schemes worth a thought, the cheapest first. `budget_bytes` decides on packs and recomputing."""
    whole = sum(max(0.0, gain) for gain in gains.values()) or 1.0
    found: dict[tuple[Site, ...], Candidate] = {}
    for depth in sorted({max(1, round(part * shape.layers)) for part in _DEPTHS}):
        top = tuple(sorted(every_site(shape.layers, shape.layers - depth)))
        for sites in (top, _worthwhile(top, gains)):
            setting = fit(shape, sites, load, rank, item_bytes, budget_bytes)
            share = sum(max(0.0, gains[site]) for site in sites) / whole
            found.setdefault(sites, price(shape, sites, setting, load, share))
    return sorted(found.values(), key=lambda one: (one.work, one.share))


def price(shape: Architecture, sites: Sequence[Site], setting: Setting, load: Load, share: float) -> Candidate:
    """A scheme with its costs."""
    later = step_work(shape, sites, answer_share=load.answer_share, recompute=setting.recompute)
    work = load.tokens * (load.epochs * later + prefix_work(shape, sites))
    return Candidate(
        tuple(sites),
        scheme_text(sites, shape.layers),
        setting,
        parameters(shape, sites, setting.rank),
        memory_bytes(shape, sites, setting),
        work,
        share,
    )


def choose(
    found: Sequence[Candidate], budget_bytes: int | None, most_work: float | None = None, enough: float = ENOUGH
) -> Candidate:
    """The cheapest candidate with enough of the gain; where none fits that has it, the one with most.

    Raises ConfigError with the least memory that would do.
    """
    fitting = [one for one in found if fits(one.memory_bytes, budget_bytes)]
    if not fitting:
        raise ConfigError(too_small(min(one.memory_bytes for one in found), budget_bytes))
    timely = [one for one in fitting if most_work is None or one.work <= most_work] or [
        min(fitting, key=lambda one: one.work)
    ]
    return next(
        (one for one in sorted(timely, key=lambda one: one.work) if one.share >= enough),
        max(timely, key=lambda one: one.share),
    )


def fit(
    shape: Architecture,
    sites: Sequence[Site],
    load: Load,
    rank: int,
    item_bytes: int,
    budget_bytes: int | None,
) -> Setting:
    """The fastest way to train these sites that the memory allows; the thriftiest if none does."""
    packs = [tokens for tokens in _PACKS if tokens > load.longest] or [load.longest]
    settings = [
        Setting(rank, tokens, load.longest, item_bytes, recompute) for recompute in (False, True) for tokens in packs
    ]
    for setting in settings:
        if fits(memory_bytes(shape, sites, setting), budget_bytes):
            return setting
    return settings[-1]


def fits(needed_bytes: int, budget_bytes: int | None) -> bool:
    """Whether an estimate is surely within the budget."""
    return budget_bytes is None or surely(needed_bytes) <= budget_bytes


def surely(needed_bytes: int) -> int:
    """A budget within which an estimate is safe."""
    return int(needed_bytes * _SURE)


def too_small(needed_bytes: int, budget_bytes: int | None) -> str:
    """What to say where nothing fits."""
    needed_mib = -(-surely(needed_bytes) >> 20)
    return (
        f"the memory budget of {(budget_bytes or 0) >> 20} MiB is too small: at least about {needed_mib} MiB are "
        "needed here; shorter examples, a smaller rank or fewer layers need less"
    )


def _worthwhile(top: Sequence[Site], gains: Mapping[Site, float]) -> tuple[Site, ...]:
    """Without the matrices that bring least, as long as nearly all of the gain is kept."""
    left = sorted(top, key=lambda site: gains[site])
    whole = sum(max(0.0, gains[site]) for site in top)
    lost = 0.0
    while len(left) > 1 and lost + max(0.0, gains[left[0]]) <= (1 - _KEPT) * whole:
        lost += max(0.0, gains[left.pop(0)])
    return tuple(sorted(left))
