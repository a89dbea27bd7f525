"""The choice of what to train, on gains made up for the purpose; and the costs it rests on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgellm.errors import ConfigError
from edgellm.models.gguf import read_header
from edgellm.tune.architecture import Architecture, matrix_shape, read_architecture
from edgellm.tune.cost import Setting, layer_work, memory_bytes, parameters, prefix_work, step_work
from edgellm.tune.plan import Candidate, Load, candidates, choose, fit
from edgellm.tune.scheme import Site, every_site, parse_scheme
from tests.support.tiny_gguf import write_tiny_llama

LAYERS = 10
LOAD = Load(tokens=10_000, answer_share=0.5, longest=200, epochs=3)
GIB = 1 << 30


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    """Of a model large enough for its own memory to count."""
    path = write_tiny_llama(tmp_path_factory.mktemp("plan") / "m.gguf", layers=LAYERS)
    return replace(read_architecture([read_header(path)]), width=2048, hidden=8192, heads=32, kv_heads=32)


def gains(**of_layer: float) -> dict[Site, float]:
    """1 for each matrix of a layer, but for those named: l3=0.5."""
    return {site: of_layer.get(f"l{site.layer}", 1.0) for site in every_site(LAYERS)}


def found(shape: Architecture, known: dict[Site, float], budget: int | None = None) -> list[Candidate]:
    return candidates(shape, known, LOAD, 16, 2, budget)


def test_candidates_cost_more_the_more_they_bring(shape: Architecture) -> None:
    every = [one for one in found(shape, gains()) if one.text.startswith("top-") or one.text == "none"]
    assert [one.work for one in every] == sorted(one.work for one in every)
    assert [one.share for one in every] == sorted(one.share for one in every)
    assert [one.memory_bytes for one in every] == sorted(one.memory_bytes for one in every)
    assert every[-1].text == "none"
    assert every[-1].share == pytest.approx(1)


def test_matrices_that_bring_nothing_are_left_out(shape: Architecture) -> None:
    known = {site: -0.5 if site.tensor == "attn_k" else 1.0 for site in every_site(LAYERS)}
    several = found(shape, known)
    without = [one for one in several if all(site.tensor != "attn_k" for site in one.sites)]
    assert len(without) == len(several) / 2
    assert max(one.share for one in without) >= 0.97


def test_the_cheapest_that_brings_enough_is_chosen(shape: Architecture) -> None:
    low = {f"l{layer}": 0.01 for layer in range(7)}
    assert set(choose(found(shape, gains(**low)), None).sites) <= set(parse_scheme("top-3", LAYERS))
    high = {f"l{layer}": 0.01 for layer in range(3, 10)}
    assert choose(found(shape, gains(**high)), None).sites[0].layer == 0


def test_memory_and_time_hold_it_back(shape: Architecture) -> None:
    known = gains()
    free = choose(found(shape, known), None)
    tight = choose(found(shape, known, 3 * GIB // 2), 3 * GIB // 2)
    assert tight.memory_bytes <= 3 * GIB // 2 < free.memory_bytes
    assert tight.setting != free.setting
    hasty = choose(found(shape, known), None, most_work=free.work / 2)
    assert hasty.work <= free.work / 2
    assert hasty.share < free.share
    assert choose(found(shape, known), None, most_work=1.0).work == min(one.work for one in found(shape, known))


def test_a_budget_that_nothing_fits_says_what_would(shape: Architecture) -> None:
    with pytest.raises(ConfigError, match=r"the memory budget of 100 MiB is too small: at least about \d+ MiB"):
        choose(found(shape, gains(), 100 << 20), 100 << 20)


def test_memory_is_first_saved_on_packs_then_by_recomputing(shape: Architecture) -> None:
    sites = every_site(LAYERS)
    seen = [fit(shape, sites, LOAD, 16, 2, budget) for budget in (None, 4 * GIB, 2 * GIB, 3 * GIB // 2, 1)]
    assert seen[0].pack_tokens == 2048
    needs = [memory_bytes(shape, sites, setting) for setting in seen]
    assert needs == sorted(needs, reverse=True)
    assert not seen[0].recompute
    assert seen[-1] == Setting(16, 256, 200, 2, recompute=True)
    long = replace(LOAD, longest=5000)
    assert fit(shape, sites, long, 16, 2, 1).pack_tokens == 5000


def test_the_costs_are_those_of_the_matrices(shape: Architecture) -> None:
    sites = parse_scheme("top-2:attn_q,ffn_down", LAYERS)
    assert parameters(shape, sites, 8) == 8 * 2 * sum(sum(matrix_shape(shape, name)) for name in ("attn_q", "ffn_down"))
    layer = 4 * 2048 * 2048 if shape.head_width == 64 else layer_work(shape) - 3 * 2048 * 8192
    assert layer_work(shape) == layer + 3 * 2048 * 8192
    assert prefix_work(shape, sites) == 8 * layer_work(shape)
    head = 2 * 0.5 * shape.vocabulary * shape.width
    assert step_work(shape, sites, answer_share=0.5, recompute=False) == 4 * layer_work(shape) + head
    assert step_work(shape, sites, answer_share=0.5, recompute=True) == 6 * layer_work(shape) + head
