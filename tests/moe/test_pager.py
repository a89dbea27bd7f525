"""Loading paged models: what happens when a part of it fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgellm.backend import model as model_module
from edgellm.backend.context import Context
from edgellm.backend.experts import ExpertStore
from edgellm.backend.model import Model
from edgellm.errors import ModelLoadError
from edgellm.moe import pager, recorder
from edgellm.moe.layout import ExpertLayout, read_layout
from edgellm.moe.pager import load_paged
from edgellm.moe.routers import Router, read_routers
from tests.moe.test_paging import run
from tests.support.tiny_moe import write_tiny_moe


class _Stop(BaseException):
    """Nothing expects it."""


def stop(*_: object, **__: object) -> None:
    raise _Stop


@pytest.fixture
def layout(tmp_path: Path) -> ExpertLayout:
    found = read_layout(write_tiny_moe(tmp_path / "moe.gguf", "qwen3moe"))
    assert found is not None
    return found


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was closed, in order."""
    heard: list[str] = []
    for kind in (Context, Model, ExpertStore):

        def close(thing: object, real=kind.close, name: str = kind.__name__) -> None:
            real(thing)
            heard.append(name)

        monkeypatch.setattr(kind, "close", close)
    return heard


@pytest.mark.parametrize(
    ("place", "order"),
    [
        ("edgellm.backend.model.packing", ["ExpertStore", "Model"]),  # before llama.cpp has a model
        ("edgellm.backend.model.Vocab", ["ExpertStore", "Model"]),
        ("edgellm.moe.pager.read_routers", ["ExpertStore", "Model"]),
    ],
)
def test_what_was_opened_is_closed(
    place: str,
    order: list[str],
    layout: ExpertLayout,
    tmp_path: Path,
    closed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model's own close ends with that of the store that it lies in."""
    monkeypatch.setattr(place, stop)
    with pytest.raises(_Stop):
        load_paged(layout, layout.least_bytes, tmp_path)
    assert closed == order


@pytest.mark.parametrize(
    ("place", "order"),
    [
        ("edgellm.backend.vocab.Vocab.tokenize", ["ExpertStore", "Model"]),
        ("edgellm.moe.recorder.Context", ["ExpertStore", "Model"]),
        ("edgellm.moe.recorder._Counter.take", ["Context", "ExpertStore", "Model"]),
    ],
)
def test_a_recording_closes_what_it_has_opened(
    place: str,
    order: list[str],
    layout: ExpertLayout,
    tmp_path: Path,
    closed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, stop)
    with pytest.raises(_Stop):
        recorder.record_routes(
            layout, "the name", 16, tmp_path, budget_bytes=layout.least_bytes, threads=1, architecture="qwen3moe"
        )
    assert closed == order


def _unreadable(_layout: ExpertLayout) -> tuple[Router, ...]:
    raise OSError("the disk has a fault")


def _misshapen(layout: ExpertLayout) -> tuple[Router, ...]:
    first, *others = read_routers(layout)
    return (Router(first.weights, np.zeros(3, np.float32), first.selection_bias, first.sigmoid), *others)


@pytest.mark.parametrize(
    ("routers", "why"), [(_unreadable, "the disk has a fault"), (_misshapen, "a router has another shape")]
)
def test_routers_that_cannot_be_used_cost_no_load(
    routers: object, why: str, layout: ExpertLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    expected = run(load_paged(layout, layout.least_bytes, tmp_path))
    monkeypatch.setattr(pager, "read_routers", routers)
    model = load_paged(layout, layout.least_bytes, tmp_path)
    assert f"moe.gguf: its routers cannot be used, experts are foreseen by those that went before: {why}" in caplog.text
    assert np.array_equal(run(model), expected)


def test_clients_are_shown_no_folders(layout: ExpertLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager, "skeleton_of", lambda *_: tmp_path / "moe.gguf")
    layout.files[0].unlink()
    with pytest.raises(ModelLoadError, match=r"moe\.gguf: No such file") as found:
        load_paged(layout, layout.least_bytes, tmp_path)
    assert str(tmp_path) not in str(found.value)
    monkeypatch.setattr(model_module, "take_errors", lambda: f"failed to open GGUF file '{layout.files[0]}'")
    with pytest.raises(ModelLoadError, match=r"could not load moe\.gguf: failed to open GGUF file 'moe\.gguf'$"):
        Model(layout.files[0])
