"""Policies on traces: the pager's own against baselines and the bound, and the native copy against the reference."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgellm import _kernels
from edgellm.moe.replay import (
    Belady,
    Lfu,
    LookAhead,
    Lru,
    Policy,
    Visit,
    _Ranked,
    cold_visits,
    replay,
    visits_of,
    warm_visits,
)
from edgellm.moe.residency import Load, Residency
from edgellm.moe.routes import PROMPT, Trace, write_trace
from tests.moe.traces import all_traces, made_up

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "replay_routes"
TRACES = all_traces()
NAMES = [trace.shape.model.rpartition("/")[2] for trace in TRACES]
SHARES = (0.05, 0.12, 0.24, 0.48, 0.75)


def pool_of(trace: Trace, share: float) -> int:
    return int(share * trace.shape.layers * trace.shape.experts)


def native(trace: Trace, slots: int) -> Policy:
    return _kernels.Residency(trace.shape.layers, trace.shape.experts, pools=[0] * trace.shape.layers, slots=[slots])


class Both:
    """The two copies; every decision must be the same."""

    def __init__(self, trace: Trace, slots: int) -> None:
        layers, experts = trace.shape.layers, trace.shape.experts
        self._python = Residency(layers, experts, pools=[0] * layers, slots=[slots])
        self._native = native(trace, slots)

    def visit(self, layer: int, experts: Sequence[int], /) -> Sequence[Load]:
        return self._same(self._python.visit(layer, experts), self._native.visit(layer, experts))

    def prefetch(self, layer: int, experts: Sequence[int], limit: int, /) -> Sequence[Load]:
        return self._same(self._python.prefetch(layer, experts, limit), self._native.prefetch(layer, experts, limit))

    def _same(self, ours: list[Load], theirs: Sequence[object]) -> list[Load]:
        names = ("expert", "slot", "evicted_layer", "evicted_expert")
        assert [[getattr(load, n) for n in names] for load in theirs] == [[getattr(x, n) for n in names] for x in ours]
        return ours


@pytest.mark.parametrize("trace", TRACES, ids=NAMES)
@pytest.mark.parametrize("share", [0.05, 0.24])
def test_the_native_copy_takes_the_same_decisions(trace: Trace, share: float) -> None:
    outcome = replay(Both(trace, pool_of(trace, share)), warm_visits(trace, prompt_rows=8), trace, LookAhead(0.8, 3))
    assert outcome.hits > 0
    assert outcome.ahead > 0


@pytest.mark.parametrize("trace", TRACES, ids=NAMES)
@pytest.mark.parametrize("warm", [False, True])
def test_it_is_never_below_lru_nor_above_the_bound(trace: Trace, warm: bool) -> None:
    """On short made-up traces a few uses, 0.3 % of them, are left to chance where nearly everything hits."""
    visits = warm_visits(trace) if warm else cold_visits(trace)
    chance = 0.003 if trace.shape.model.startswith("made-up") else 0.0
    gains = []
    for share in SHARES:
        slots, experts = pool_of(trace, share), trace.shape.experts
        ours = replay(native(trace, slots), visits, trace)
        lru = replay(Lru(experts, slots), visits, trace)
        lfu = replay(Lfu(experts, slots), visits, trace)
        bound = replay(Belady(experts, slots, visits), visits, trace)
        assert lru.hits - chance * lru.uses <= ours.hits <= bound.hits
        assert lfu.hits <= bound.hits
        gains.append(ours.hit_rate - lru.hit_rate)
    assert max(gains) > 0.01


def test_belady_is_the_best_of_all_choices() -> None:
    """Against every way of evicting, tried out on small traces."""
    for seed in range(20):
        draw = random.Random(seed)
        trace = made_up(seed, layers=1, experts=5, top_k=1, prompt=0, decoded=1)
        visits = [Visit(0, (draw.randrange(5),)) for _ in range(9)]
        states: dict[frozenset[int], int] = {frozenset(): 0}
        for visit in visits:
            (needed,) = visit.experts
            following: dict[frozenset[int], int] = {}
            for held, hits in states.items():
                if needed in held:
                    nexts = [held]
                elif len(held) < 3:
                    nexts = [held | {needed}]
                else:
                    nexts = [held - {gone} | {needed} for gone in held]
                for state in nexts:
                    following[state] = max(following.get(state, 0), hits + (needed in held))
            states = following
        assert replay(Belady(5, 3, visits), visits, trace).hits == max(states.values())


def test_look_ahead_brings_experts_in_time_and_is_no_hit() -> None:
    trace = made_up(4)
    visits, slots = cold_visits(trace), pool_of(trace, 0.24)
    alone = replay(native(trace, slots), visits, trace)
    perfect = replay(native(trace, slots), visits, trace, LookAhead(1.0, 100))
    wrong = replay(native(trace, slots), visits, trace, LookAhead(0.0, 100))
    assert alone.ahead == 0
    assert perfect.hits + perfect.ahead > 0.95 * perfect.uses
    assert abs(perfect.hit_rate - alone.hit_rate) < 0.02
    assert abs(perfect.read_bytes - alone.read_bytes) < 0.05 * alone.read_bytes
    assert wrong.ahead == 0
    assert wrong.read_bytes > 1.1 * alone.read_bytes
    assert wrong.hit_rate > alone.hit_rate - 0.1  # it learns to mistrust what it is told


def test_bytes_and_hits_are_counted_by_hand() -> None:
    trace = made_up(1, layers=2, experts=4, top_k=2, prompt=0, decoded=1)  # 1000 and 1500 bytes an expert
    visits = [Visit(0, (0, 1), False), Visit(1, (2,)), Visit(0, (1, 2)), Visit(1, (2, 3))]
    outcome = replay(Lru(4, 3), visits, trace)
    assert (outcome.uses, outcome.hits, outcome.ahead) == (5, 2, 0)
    assert outcome.read_bytes == 2 * 1000 + 1500 + 1000 + 1500
    streamed = replay(Lru(4, 0), visits, trace)
    assert (streamed.hits, streamed.read_bytes) == (0, 2 * 1000 + 1500 + 2 * 1000 + 2 * 1500)


def test_prompts_are_computed_in_chunks() -> None:
    trace = made_up(2, layers=3, prompt=10)
    prompt = trace.phase(PROMPT)
    visits = visits_of(prompt, rows=4, counted=False)
    assert [visit.layer for visit in visits] == [0, 1, 2] * 3
    assert set(visits[4].experts) == {expert for step in prompt[4:8] for expert in step.experts[1]}
    assert replay(Lru(32, 10), visits, trace).uses == 0


def test_a_policy_that_breaks_the_rules_is_caught() -> None:
    trace = made_up(1, layers=1, experts=4, top_k=2, prompt=0, decoded=4)

    class Wild:
        def visit(self, _layer: int, experts: Sequence[int], /) -> list[Load]:
            return [Load(experts[0], 0, 0, experts[1])]

        def prefetch(self, _layer: int, _experts: Sequence[int], _limit: int, /) -> list[Load]:
            return []

    with pytest.raises(RuntimeError, match="cannot be evicted"):
        replay(Wild(), cold_visits(trace), trace)


def test_the_script_prints_a_table_and_json(tmp_path: Path) -> None:
    write_trace(tmp_path / "made-up.csv.gz", made_up(1))
    command = [sys.executable, SCRIPT, tmp_path / "made-up.csv.gz", "--share", "12"]
    python, native = (
        subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout.splitlines()
        for more in ([], ["--native"])
    )
    report = json.loads(python[-1])
    assert report["results"] == json.loads(native[-1])["results"]
    assert [(row["trace"], row["start"], row["slots"]) for row in report["results"]] == [
        ("made-up", "cold", 23),
        ("made-up", "warm", 23),
    ]
    assert python[:-1] == native[:-1]
    (tmp_path / "bad.csv").write_text("no trace")
    failed = subprocess.run([sys.executable, SCRIPT, tmp_path / "bad.csv"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "bad.csv" in failed.stderr.splitlines()[-1]


def test_a_baseline_without_a_rank_is_none() -> None:
    class Half(_Ranked):
        def used(self, number: int) -> None:
            pass

    with pytest.raises(TypeError, match="rank"):
        Half(4, 2)
