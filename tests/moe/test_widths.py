"""The choice of widths, on models of perplexity whose best choice is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.errors import ConfigError, ModelUnsupportedError
from edgellm.moe.widths import MEASUREMENTS, USAGE_FLOOR, Choice, Experts, Widths, choose_widths

Floats = npt.NDArray[np.float64]
BASE = 12.0
BITS = (2, 3)


def made(layers: int, each: int, seed: int = 0, **changes: object) -> Experts:
    """Experts of two widths, whose errors and usage differ widely."""
    rng = np.random.default_rng(seed)
    errors = rng.uniform(0.002, 0.02, (layers, each, 1)) * np.array([6.0, 1.0])
    sizes = [int(size) for size in rng.integers(900, 1100, layers)]
    parts = {
        "bits": BITS,
        "full_bytes": tuple(sizes),
        "narrow_bytes": tuple((size * 5 // 9, size * 7 // 9) for size in sizes),
        "errors": errors,
        "usage": rng.exponential(100, (layers, each)) + 20,
    }
    return Experts(**{**parts, **changes})  # type: ignore[arg-type]


def costs(experts: Experts, weight: Floats) -> Floats:
    """(layers, experts, 4): the rise with each number of bits, if shares are as the choice takes them to be."""
    found = np.zeros((*experts.usage.shape, 4))
    for offer, bits in enumerate(experts.bits):
        found[..., bits] = weight[:, None] * experts.usage / experts.usage.sum() * experts.errors[..., offer]
    return found


def rise(cost: Floats, widths: Widths) -> float:
    return float(np.take_along_axis(cost, widths[..., None].astype(int), 2).sum())


def additive(cost: Floats) -> Callable[[Widths], float]:
    return lambda widths: BASE * math.exp(rise(cost, widths))


def best(experts: Experts, cost: Floats, target: float) -> int:
    """The least bytes of all choices within the target."""
    layers, each = experts.usage.shape
    found = []
    for flat in itertools.product((0, *BITS), repeat=layers * each):
        widths = np.array(flat, np.uint8).reshape(layers, each)
        if rise(cost, widths) <= math.log1p(target):
            found.append(experts.bytes_of(widths))
    return min(found)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.05, 1.1))
def test_it_is_within_one_step_of_the_best(seed: int, share: float) -> None:
    experts = made(2, 3, seed)
    cost = costs(experts, np.random.default_rng(seed).uniform(1, 9, 2))
    target = math.expm1(share * rise(cost, np.full((2, 3), 2, np.uint8)))
    choice = choose_widths(experts, additive(cost), loss_target=target)
    assert choice.perplexity == pytest.approx(additive(cost)(choice.widths))
    assert choice.perplexity <= choice.base_perplexity * (1 + target) * (1 + 1e-12)
    assert choice.n_bytes == experts.bytes_of(choice.widths)
    assert choice.n_bytes <= best(experts, cost, target) + max(experts.full_bytes) * 4 / 9
    assert choice.full_bytes == 3 * sum(experts.full_bytes)


def gains(experts: Experts, cost: Floats, target: float) -> float:
    """Bytes that could be saved at most, if experts could be narrowed in part."""
    steps = []
    for layer, expert in np.ndindex(experts.usage.shape):
        (two, three), (at_two, at_three) = experts.saved_bytes[layer], cost[layer, expert, list(BITS)]
        if three / at_three > two / at_two:
            steps += [(three, at_three), (two - three, at_two - at_three)]
        else:
            steps += [(two, at_two)]
    saved, left = 0.0, math.log1p(target)
    for gained, lost in sorted(steps, key=lambda step: step[1] / step[0]):
        part = min(1.0, left / lost)
        saved, left = saved + part * gained, left - part * lost
    return saved


@pytest.mark.parametrize("layers", [6, 40])
def test_a_large_model_is_as_good_as_can_be(layers: int) -> None:
    """In a larger one layers share measurements, and what each costs is no longer known."""
    experts = made(layers, 32)
    cost = costs(experts, np.linspace(1, 4, layers))
    choice = choose_widths(experts, additive(cost), loss_target=0.02)
    assert choice.measurements <= MEASUREMENTS
    saved = choice.full_bytes - choice.n_bytes
    assert saved > (0.999 if layers == 6 else 0.98) * gains(experts, cost, 0.02) - max(experts.full_bytes) * 4 / 9


@pytest.mark.parametrize("seed", range(5))
def test_noise_costs_little(seed: int) -> None:
    """Measurements are off by 0.1 % (one standard deviation); five of them are allowed for, at the base and the end."""
    experts, rng = made(12, 16, seed), np.random.default_rng(seed)
    cost = costs(experts, np.random.default_rng(seed).uniform(0.5, 5, 12))

    def measure(widths: Widths) -> float:
        return additive(cost)(widths) * math.exp(0.001 * rng.standard_normal())

    choice = choose_widths(experts, measure, loss_target=0.02)
    assert choice.perplexity <= choice.base_perplexity * 1.02
    assert rise(cost, choice.widths) <= math.log1p(0.02) + 2 * 5 * 0.001
    assert choice.full_bytes - choice.n_bytes > 0.6 * gains(experts, cost, 0.02)


def test_a_sensitive_layer_stays_as_it_is() -> None:
    experts = made(8, 16)
    weight = np.full(8, 0.1)
    weight[5] = 100
    cost = costs(experts, weight)
    choice = choose_widths(experts, additive(cost), loss_target=0.02)
    narrow = (choice.widths > 0).mean(1)
    assert narrow[5] < 0.5
    assert (np.delete(choice.widths, 5, 0) == 2).all()
    assert [list(group) for group in choice.sensitivities.groups] == [[layer] for layer in range(8)]
    assert choice.sensitivities.rises.shape == (8, 2)
    assert choice.sensitivities.rises[5, 0] == pytest.approx(cost[5, :, 2].sum())


def test_a_target_of_nothing_leaves_all_as_it_is() -> None:
    experts = made(3, 4)
    choice = choose_widths(experts, additive(costs(experts, np.ones(3))), loss_target=0)
    assert not choice.widths.any()
    assert choice.perplexity == choice.base_perplexity == pytest.approx(BASE)
    assert choice.n_bytes == choice.full_bytes


def test_what_costs_nothing_is_narrowed_even_then() -> None:
    choice = choose_widths(made(3, 4), lambda widths: BASE, loss_target=0)
    assert (choice.widths == 2).all()


def test_a_generous_target_narrows_all_with_one_measurement_more() -> None:
    experts = made(3, 4)
    choice = choose_widths(experts, additive(costs(experts, np.ones(3))), loss_target=10)
    assert (choice.widths == 2).all()
    assert choice.n_bytes == 4 * sum(narrow[0] for narrow in experts.narrow_bytes)
    assert choice.measurements == 1 + 3 * 2 + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
def test_a_perplexity_that_is_no_number_is_beyond_the_target(bad: float) -> None:
    """Any expert of layer 1 at two bits spoils it, and so does more than half of the model."""
    experts = made(4, 4)
    cost = costs(experts, np.ones(4))

    def measure(widths: Widths) -> float:
        return bad if (widths[1] == 2).any() or (widths > 0).mean() > 0.5 else additive(cost)(widths)

    choice = choose_widths(experts, measure, loss_target=10)
    assert math.isfinite(choice.perplexity)
    assert (choice.widths[1] != 2).all()
    assert (choice.widths > 0).mean() == 0.5
    assert np.isinf(choice.sensitivities.rises[1, 0])


def test_nothing_is_narrowed_where_nothing_can_be_measured() -> None:
    choice = choose_widths(made(2, 4), lambda widths: math.nan if widths.any() else BASE, loss_target=1)
    assert not choice.widths.any()
    with pytest.raises(ModelUnsupportedError, match="not a number"):
        choose_widths(made(2, 4), lambda widths: math.nan, loss_target=1)


def test_an_expert_that_was_never_used_is_not_free() -> None:
    """It comes after the others if its error is so much larger that it would cost more at a twentieth of their use."""
    usage, errors = np.full((1, 4), 100.0), np.ones((1, 4, 2)) * np.array([0.06, 0.01])
    usage[0, 2] = 0
    errors[0, 2] *= 2 / USAGE_FLOOR
    experts = made(1, 4, usage=usage, errors=errors)
    choice = choose_widths(experts, additive(costs(experts, np.ones(1))), loss_target=0.008)
    assert choice.widths[0, 2] == 0
    assert (choice.widths[0] == 3).sum() == 2  # the third would be too much


def test_more_steps_never_widen_an_expert_again() -> None:
    experts, seen = made(4, 8), list[Widths]()
    cost = costs(experts, np.array([1.0, 2, 3, 4]))

    def measure(widths: Widths) -> float:
        seen.append(widths.copy())
        return additive(cost)(widths)

    choose_widths(experts, measure, loss_target=0.01)
    order = np.array([0, 0, 2, 1])  # of the bits: how narrow they are
    probes = sorted((order[widths] for widths in seen[1 + 4 * 2 :]), key=lambda ranks: int(ranks.sum()))
    assert len(probes) > 4
    for fewer, more in itertools.pairwise(probes):
        assert (fewer <= more).all()


@pytest.mark.parametrize("measurements", [12, 13, 20, 30, 100])
def test_measurements_are_bounded_and_told(measurements: int) -> None:
    experts, told = made(10, 8), list[tuple[int, int, str]]()
    choice: Choice = choose_widths(
        experts,
        additive(costs(experts, np.ones(10))),
        loss_target=0.005,
        measurements=measurements,
        progress=lambda *said: told.append(said),
    )
    assert [done for done, _, _ in told] == list(range(choice.measurements))
    assert all(choice.measurements <= most <= measurements for _, most, _ in told)
    groups = choice.sensitivities.groups
    assert [layer for group in groups for layer in group] == list(range(10))
    assert len(groups) == min(10, (measurements - 2 - 8) // 2)
    assert told[0][2] == "the model as it is"
    assert told[1][2] == ("layer 1 at 2 bits" if len(groups[0]) == 1 else f"layers 1 to {len(groups[0])} at 2 bits")


def test_widths_that_save_nothing_are_not_used() -> None:
    sizes = made(2, 4).full_bytes
    experts = made(2, 4, narrow_bytes=tuple((size, size * 7 // 9) for size in sizes))
    choice = choose_widths(experts, additive(costs(experts, np.ones(2))), loss_target=10)
    assert (choice.widths == 3).all()


def test_what_does_not_fit_together_is_refused() -> None:
    for changes in (
        {"usage": np.ones((3, 4))},
        {"usage": np.ones((2, 5))},
        {"errors": np.ones((2, 4, 1))},
        {"narrow_bytes": ((1, 2),)},
        {"narrow_bytes": ((1, 2), (1,))},
        {"bits": (2, 2)},
        {"bits": (0, 2)},
        {"errors": np.full((2, 4, 2), np.nan)},
        {"usage": np.full((2, 4), -1.0)},
        {"full_bytes": (), "narrow_bytes": (), "usage": np.ones((0, 4)), "errors": np.ones((0, 4, 2))},
    ):
        with pytest.raises(ConfigError):
            made(2, 4, **changes)
    for target in (-0.01, math.nan, math.inf):
        with pytest.raises(ConfigError, match="loss"):
            choose_widths(made(2, 4), lambda widths: BASE, loss_target=target)
    with pytest.raises(ConfigError, match="at least 9 measurements"):
        choose_widths(made(2, 4), lambda widths: BASE, loss_target=0.1, measurements=8)
