"""What narrowing does is measured on the model, and what was chosen is what the pack then has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgellm.errors import ConfigError, ModelUnsupportedError
from edgellm.moe.narrowing import Bench, choose
from edgellm.moe.pack import write_pack
from tests.moe.test_paging import layout_of
from tests.support.tiny_moe import write_tiny_moe

TEXT = "Every expert has a matrix for the gate, one for what goes up and one for what comes down. " * 60


def a_bench(path: Path, home: Path) -> Bench:
    return Bench(layout_of(path), layout_of(path).whole_bytes, home, 2)


def test_usage_counts_tokens_and_not_steps(tmp_path: Path) -> None:
    bench = a_bench(write_tiny_moe(tmp_path / "model.gguf", "qwen3moe", context=1024), tmp_path)
    tokens = bench.tokens(TEXT)[:1024]
    usage = bench.usage(tokens)
    # Of the last layer llama.cpp computes only the rows that are scored: half a window.
    assert usage.sum(axis=1).tolist() == [2 * 2 * 511, 2 * 2 * 511, 2 * 2 * 256]


def test_a_choice_keeps_to_its_target_in_the_pack(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "model.gguf", "qwen3moe", weights="q8_0", context=1024)
    bench = a_bench(path, tmp_path)
    tokens = bench.tokens(TEXT)[:512]
    choice = choose(bench, tokens, bench.usage(tokens), loss_target=0.01, measurements=16)
    assert choice.measurements <= 16
    assert choice.n_bytes < choice.full_bytes
    assert choice.perplexity <= 1.01 * choice.base_perplexity
    write_pack(path, tmp_path / "pack.gguf", widths=choice.widths)
    packed = a_bench(tmp_path / "pack.gguf", tmp_path)
    stored = sum(piece.stored_bytes(e) for piece in packed.layout.slices for e in range(packed.layout.experts))
    assert stored == choice.n_bytes
    assert packed.perplexity(tokens).value == pytest.approx(choice.perplexity, rel=1e-12)
    assert bench.perplexity(tokens).value == pytest.approx(choice.base_perplexity, rel=1e-12)
    assert bench.perplexity(tokens, np.full_like(choice.widths, 2)).value != bench.perplexity(tokens).value


def test_what_cannot_be_chosen(tmp_path: Path) -> None:
    bench = a_bench(write_tiny_moe(tmp_path / "model.gguf", "qwen3moe"), tmp_path)
    with pytest.raises(ModelUnsupportedError, match="type F32 cannot be narrowed"):
        choose(bench, list(range(512)), bench.usage(list(range(250))), loss_target=0.1)
    with pytest.raises(ConfigError, match="fewer than one window"):
        choose(bench, [1, 2, 3], bench.usage([1, 2, 3]), loss_target=0.1)
