"""Adapters worked into weights: what llama.cpp computes of both is the same, but for rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams, Floats
from edgellm.backend.model import Adapter, Model
from edgellm.errors import AdapterError, ModelUnsupportedError
from edgellm.models.ggml_types import GGML_TYPES
from edgellm.models.gguf import read_header
from edgellm.tune.merge import merge_adapter
from tests.support.tiny_gguf import write_tiny_llama, write_tiny_lora

TOKENS = list(b"hello world, the user is in the name of you")


def logits(path: Path, adapter: Path | None = None) -> Floats:
    """After TOKENS."""
    model = Model(path)
    context = Context(model, ContextParams(context_tokens=64, sequences=1, batch_tokens=64, outputs=1, threads=1))
    loaded = None if adapter is None else Adapter(model, adapter)
    if loaded is not None:
        context.set_adapters([(loaded, 1.0)])
    batch = Batch(64)
    batch.extend(TOKENS, 0, 0, outputs=1)
    context.decode(batch)
    found = np.array(context.logits(len(TOKENS) - 1))
    context.close()
    if loaded is not None:
        loaded.close()
    model.close()
    return found


@pytest.mark.parametrize("weights", ["f32", "q8_0"])
def test_a_merged_model_computes_what_the_adapter_makes_of_it(tmp_path: Path, weights: str) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf", weights=weights)
    adapter = write_tiny_lora(tmp_path / "a.gguf", model, magnitude=0.3)
    merge_adapter(model, adapter, tmp_path / "merged.gguf")
    plain, adapted, merged = logits(model), logits(model, adapter), logits(tmp_path / "merged.gguf")
    away = np.linalg.norm(adapted - plain)
    assert away > 0.1 * np.linalg.norm(plain)
    assert np.linalg.norm(merged - adapted) < 0.1 * away


def test_only_matrices_with_an_adapter_change(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf")
    adapter = write_tiny_lora(tmp_path / "a.gguf", model)
    merge_adapter(model, adapter, tmp_path / "merged.gguf")
    touched = {info.name.removesuffix(".lora_a") for info in read_header(adapter).tensors}
    before, after = read_header(model), read_header(tmp_path / "merged.gguf")
    assert {"general.alignment": 32, **before.metadata} == {"general.alignment": 32, **after.metadata}
    raw = model.read_bytes(), (tmp_path / "merged.gguf").read_bytes()
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, old.dims) == (new.name, new.dims)
        if old.name in touched:
            assert new.type.name == "Q8_0"
        else:
            assert old.type == new.type
            places = before.data_offset + old.offset, after.data_offset + new.offset
            first, second = (data[at : at + old.n_bytes] for data, at in zip(raw, places, strict=True))
            assert first == second


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf")
    other = write_tiny_llama(tmp_path / "other.gguf", width=128)
    deeper = write_tiny_llama(tmp_path / "deeper.gguf", layers=3)
    merged = tmp_path / "merged.gguf"
    for base in (other, deeper):
        adapter = write_tiny_lora(tmp_path / "a.gguf", base)
        with pytest.raises(AdapterError):
            merge_adapter(model, adapter, merged)
    with pytest.raises(AdapterError):
        merge_adapter(model, other, merged)  # no adapter at all
    adapter = write_tiny_lora(tmp_path / "a.gguf", model)
    q6_k = next(kind for kind in GGML_TYPES.values() if kind.name == "Q6_K")
    with pytest.raises(ModelUnsupportedError, match="no rows of Q6_K"):
        merge_adapter(model, adapter, merged, q6_k)
    assert not merged.exists()
    assert not list(tmp_path.glob(".writing-*"))
