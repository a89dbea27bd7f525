"""Perplexity against logits of whole windows, of models in memory and paged ones."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.errors import ConfigError, ExpertReadError
from edgellm.moe import perplexity as module
from edgellm.moe.layout import read_layout
from edgellm.moe.pager import load_paged
from edgellm.moe.perplexity import output_rows, perplexity
from edgellm.moe.sample_text import sample_text
from tests.support.tiny_moe import write_tiny_moe

TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 250, 200)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_moe(tmp_path_factory.mktemp("perplexity") / "model.gguf", "qwen3moe")


def slowly(path: Path, window: int, windows: int) -> tuple[float, int]:
    """Perplexity from all logits of each window at once, and how many tokens it is of."""
    model, total, scored = Model(path), 0.0, 0
    context = Context(model, ContextParams(256, sequences=1, batch_tokens=256, outputs=256, threads=1))
    for number in range(windows):
        part = TOKENS[number * window : (number + 1) * window]
        batch = Batch(256)
        batch.extend(part, 0, 0, outputs=window)
        context.clear()
        context.decode(batch)
        for position in range(window // 2, window):
            exponents = np.exp(context.logits(position - 1).astype(np.float64))
            total -= np.log(exponents[part[position]] / exponents.sum())
            scored += 1
    context.close()
    model.close()
    return float(np.exp(total / scored)), scored


@pytest.mark.parametrize(("window", "windows"), [(200, 1), (64, 3), (7, 5), (3, 1), (2, 100)])
@pytest.mark.parametrize("rows", [128, 5, 1])
def test_it_is_that_of_the_second_halves(
    path: Path, window: int, windows: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(path)
    monkeypatch.setattr(module, "_LOGITS_BYTES", 4 * model.vocab.n_tokens * rows)
    assert output_rows(model.vocab.n_tokens) == rows
    found = perplexity(model, TOKENS, window=window, windows=windows, threads=1)
    model.close()
    value, scored = slowly(path, window, windows)
    assert (found.scored_tokens, found.windows) == (scored, windows)
    assert np.log(found.value) == pytest.approx(np.log(value), abs=2e-3)  # steps of other sizes round differently


def test_all_whole_windows_are_scored_unless_a_number_is_given(path: Path) -> None:
    model = Model(path)
    whole = perplexity(model, TOKENS, window=64, threads=1)
    assert whole == perplexity(model, TOKENS[: 3 * 64], window=64, windows=9, threads=1)
    assert (whole.windows, whole.scored_tokens) == (3, 96)
    model.close()


def test_a_paged_model_has_the_perplexity_of_the_model(path: Path, tmp_path: Path) -> None:
    layout = read_layout(path, packed=False)
    assert layout is not None
    plain = Model(path, mapped=False)
    expected = perplexity(plain, TOKENS, window=100, threads=2)
    plain.close()
    paged = load_paged(layout, layout.least_bytes, tmp_path, packed=False)
    assert perplexity(paged, TOKENS, window=100, threads=2) == expected
    paged.close()


def test_an_expert_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    own = write_tiny_moe(tmp_path / "model.gguf", "qwen3moe")
    layout = read_layout(own)
    assert layout is not None
    model = load_paged(layout, layout.least_bytes, tmp_path)
    with own.open("r+b") as file:
        file.truncate(own.stat().st_size - 4)
    with pytest.raises(ExpertReadError):
        perplexity(model, TOKENS, window=64, threads=1)
    model.close()


def test_logits_of_a_large_vocabulary_stay_small() -> None:
    assert output_rows(152_000) * 152_000 * 4 <= 32 << 20
    assert output_rows(10**8) == 1
    assert output_rows(300) == 128


@pytest.mark.parametrize(("window", "windows"), [(201, None), (1, None), (0, None), (64, 0)])
def test_what_gives_no_window_is_refused(path: Path, window: int, windows: int | None) -> None:
    model = Model(path)
    with pytest.raises(ConfigError, match="window"):
        perplexity(model, TOKENS, window=window, windows=windows, threads=1)
    model.close()


def test_logits_that_are_no_numbers_give_no_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(path)
    for bad in (np.nan, np.inf):
        row = np.full(300, bad, np.float32)
        monkeypatch.setattr(Context, "logits", lambda self, number, row=row: row)
        assert np.isnan(perplexity(model, TOKENS, window=64, threads=1).value)
    low = np.zeros(300, np.float32)
    low[299] = 1e6  # all others are impossible
    monkeypatch.setattr(Context, "logits", lambda self, number: low)
    assert perplexity(model, TOKENS, window=64, threads=1).value == np.inf
    model.close()


def test_the_sample_text_is_long_and_always_the_same() -> None:
    text = sample_text()
    assert len(text) > 100_000
    assert "Python" in text
    assert sample_text() == text


def test_a_python_without_its_reference_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ConfigError, match="name a text file"):
        sample_text()
