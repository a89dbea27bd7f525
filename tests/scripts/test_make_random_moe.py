"""Random mixtures of experts: weights as asked for, the same at every writing, decoded and routed by llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from moe.random_blocks import BLOCK_TYPES, random_blocks
from moe.random_model import PRESETS, RandomShape, write_random_moe
from moe.routing import Routes, belady_hits, lru_hits, record_routes, routing_stats

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_random_moe"
TEXT = "hello world: the name of the user is to be true in 42 null and false ways, you know? " * 4
TINY = RandomShape("qwen3moe", 3, 16, 2, 256, 256, 4, 2, 64, "Q4_K")


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_have_the_spread_that_is_asked_for(kind: str) -> None:
    data = random_blocks(np.random.default_rng(1), kind, (4, 64, 512), 0.02)
    weights = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert weights.shape == (4, 64, 512)
    # MXFP4 knows powers of two only; the others' standard deviation is estimated from 131,072 weights: 1 % is 5 sigma
    np.testing.assert_allclose(weights.std(), 0.02, rtol=0.45 if kind == "MXFP4" else 0.012)
    half_a_step = 0.02 / np.sqrt(255 / 12) / 2
    assert abs(weights.mean()) < half_a_step + 5 * 0.02 / 131_072**0.5
    assert not np.array_equal(data[0], data[1])


def test_rows_are_whole_blocks() -> None:
    with pytest.raises(ValueError, match="multiples of 256"):
        random_blocks(np.random.default_rng(1), "Q4_K", (4, 128), 1.0)


@pytest.mark.parametrize(
    "shape",
    [TINY, replace(TINY, architecture="olmoe", kv_heads=4), replace(TINY, kind="Q8_0"), replace(TINY, kind="MXFP4")],
    ids=lambda shape: f"{shape.architecture}-{shape.kind}",
)
def test_the_file_is_the_same_again_and_routes_by_token(tmp_path: Path, shape: RandomShape) -> None:
    said: list[str] = []
    for name in ("a", "b"):
        write_random_moe(tmp_path / name, shape, 7, said.append)
    assert said == ["blk.0", "blk.1", "blk.2"] * 2
    path = tmp_path / "a"
    assert path.read_bytes() == (tmp_path / "b").read_bytes()
    sizes = {tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors if "_exps" in tensor.name}
    assert sizes == {shape.expert_bytes // 3 * shape.experts}
    routes = record_routes(path, TEXT, 100)
    assert routes.chosen.shape == (3, 100, 2)
    stats = routing_stats(routes)
    assert stats.overlap < 0.9
    assert stats.look_ahead_recall > 2 * 2 / 16  # chance is 2 / 16
    assert stats.used > 0.5


def test_skew_makes_some_experts_liked_more(tmp_path: Path) -> None:
    hot = []
    for skew in (0.0, 0.9):
        write_random_moe(tmp_path / "a", replace(TINY, skew=skew), 0, lambda layer: None)
        hot.append(routing_stats(record_routes(tmp_path / "a", TEXT, 100)).hot_list_recall)
    assert hot[1] > hot[0] + 0.1


@pytest.mark.parametrize(
    "change", [{"width": 200}, {"experts_used": 17}, {"skew": 1.0}, {"architecture": "olmoe"}, {"kv_heads": 3}]
)
def test_impossible_shapes_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must|as many|multiple"):
        replace(TINY, **change)


def test_the_presets_are_as_large_as_the_help_says() -> None:
    sizes = {name: shape.layers * shape.experts * shape.expert_bytes / 1e9 for name, shape in PRESETS.items()}
    assert sizes == {"small": pytest.approx(0.4, abs=0.03), "olmoe": pytest.approx(3.7, abs=0.1),
                     "qwen3-30b": pytest.approx(16.3, abs=0.1)}  # fmt: skip


def test_the_command(tmp_path: Path) -> None:
    sizes = {"layers": 2, "experts": 4, "experts-used": 2, "width": 256, "expert-width": 256, "heads": 4}
    options = [
        f"--{name}={value}" for name, value in {**sizes, "kv-heads": 2, "head-width": 64, "kind": "q6_k"}.items()
    ]
    command = [sys.executable, SCRIPT, tmp_path / "a.gguf", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kind"] == "Q6_K"
    assert result["file_bytes"] == (tmp_path / "a.gguf").stat().st_size
    refused = subprocess.run([*command, "--width", "100"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "multiples of 256" in refused.stderr


def test_caches() -> None:
    accesses = [0, 1, 2, 0, 1, 3, 0]
    assert lru_hits(accesses, 2) == 0
    assert lru_hits(accesses, 3) == pytest.approx(3 / 7)
    assert belady_hits(accesses, 2) == pytest.approx(2 / 7)
    assert belady_hits(accesses, 3) == pytest.approx(3 / 7)


def test_belady_is_the_bound() -> None:
    accesses = np.random.default_rng(0).zipf(1.3, 400).clip(max=40).tolist()
    for cells in (1, 5, 20, 40):
        assert belady_hits(accesses, cells) >= lru_hits(accesses, cells)
    assert belady_hits(accesses, 40) == pytest.approx(1 - len(set(accesses)) / len(accesses))


def test_statistics_of_known_routes() -> None:
    chosen = np.array([[[0, 1], [1, 2], [1, 0]], [[2, 3], [2, 3], [2, 3]]], np.int32)  # (2 layers, 3 tokens, 2)
    guessed = np.array([[[3, 0], [2, 3], [0, 1]]], np.int32)
    stats = routing_stats(Routes(chosen, guessed, experts=4))
    assert stats.overlap == pytest.approx((1 + 1 + 2 + 2) / 8)
    assert stats.look_ahead_recall == pytest.approx(3 / 6)
    assert stats.used == pytest.approx(5 / 8)
    assert stats.hot_list_recall == pytest.approx((2 + 1 + 2 + 6) / 12)
