"""Model, context and batch: what they refuse, and that cached positions move as they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgellm.backend.batch import Batch
from edgellm.backend.context import CacheFullError, Context
from edgellm.backend.library import EXPECTED_VERSION, lib
from edgellm.backend.model import Model
from edgellm.errors import BackendError, ModelLoadError

TEXT = list(b"hello world, hello user")


def _read(context: Context, tokens: list[int], *, start: int = 0, sequence: int = 0) -> np.ndarray:
    """Computes `tokens` and returns the last row's logits, (vocabulary,)."""
    batch = Batch(300)
    batch.extend(tokens, start, sequence, outputs=1)
    context.decode(batch)
    return context.logits(len(tokens) - 1).copy()


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF, says the file")
    with pytest.raises(ModelLoadError, match=r"broken\.gguf"):
        Model(path)


def test_facts_of_the_model(model: Model) -> None:
    assert (model.trained_context_tokens, model.embedding_width) == (512, 64)
    assert (model.has_decoder, model.has_encoder, model.can_roll_back) == (True, False, True)


def test_close_is_idempotent(path: Path) -> None:
    model = Model(path)
    model.close()
    model.close()


def test_another_version_of_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    monkeypatch.setattr(llama_cpp, "__version__", "0.0.1")
    with pytest.raises(BackendError, match=EXPECTED_VERSION):
        lib.__wrapped__()


def test_a_full_cache_is_an_error_that_changes_nothing(context: Context) -> None:
    expected = _read(context, TEXT)
    with pytest.raises(CacheFullError):
        _read(context, [65] * 250, sequence=1)
    assert context.last_position(0) == len(TEXT) - 1
    assert context.last_position(1) == -1
    context.clear()
    assert _read(context, TEXT) == pytest.approx(expected, abs=1e-5)


def test_a_token_outside_the_vocabulary_is_an_error(context: Context) -> None:
    with pytest.raises(BackendError, match="status"):
        _read(context, [10**6])


def test_rows_without_output_have_no_logits(context: Context) -> None:
    _read(context, TEXT)
    with pytest.raises(BackendError, match="no logits"):
        context.logits(0)


def test_copies_share_and_removals_cut(context: Context) -> None:
    expected = _read(context, [*TEXT, 66])
    context.clear()
    _read(context, [*TEXT, 99, 98])
    context.copy(0, 2, len(TEXT))
    assert context.last_position(2) == len(TEXT) - 1
    assert _read(context, [66], start=len(TEXT), sequence=2) == pytest.approx(expected, abs=2e-2)
    assert context.remove(0, len(TEXT))
    assert context.last_position(0) == len(TEXT) - 1
    assert _read(context, [66], start=len(TEXT)) == pytest.approx(expected, abs=2e-2)


def test_what_was_saved_can_be_loaded_into_another_sequence(context: Context) -> None:
    _read(context, TEXT)
    saved = context.save(0)
    assert (saved.dtype, saved.ndim) == (np.uint8, 1)
    expected = _read(context, [66], start=len(TEXT))
    context.clear()
    assert context.load(3, saved)
    assert context.last_position(3) == len(TEXT) - 1
    assert _read(context, [66], start=len(TEXT), sequence=3) == pytest.approx(expected, abs=1e-4)


def test_loading_without_room_is_refused(context: Context) -> None:
    _read(context, TEXT)
    saved = context.save(0)
    _read(context, [65] * (256 - len(TEXT)), sequence=1)
    assert not context.load(2, saved)


def test_a_batch_keeps_rows_of_several_sequences_apart(context: Context) -> None:
    alone = [_read(context, TEXT), _read(context, [70], sequence=1), _read(context, TEXT[:5], sequence=2)]
    context.clear()
    batch = Batch(64)
    for number, tokens in enumerate((TEXT, [70], TEXT[:5])):
        assert batch.extend(tokens, 0, number, outputs=1) == (0, len(TEXT), len(TEXT) + 1)[number]
    context.decode(batch)
    rows = (len(TEXT) - 1, len(TEXT), len(TEXT) + 5)
    for row, expected in zip(rows, alone, strict=True):
        assert context.logits(row) == pytest.approx(expected, abs=2e-2)
    batch.clear()
    assert batch.n_tokens == 0
