"""Loading mixtures of experts that cannot be paged, and what else loading does with the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.backend import context as context_module
from edgellm.backend.experts import ExpertStore
from edgellm.backend.model import Model
from edgellm.config import Settings
from edgellm.engine import fit, loaded
from edgellm.engine.fit import plan_load, whole_memory
from edgellm.engine.loaded import load_runner
from edgellm.engine.runner import Runner
from edgellm.errors import ModelLoadError, ModelUnsupportedError
from edgellm.models import gguf
from edgellm.models.describe import ModelInfo, describe
from tests.engine.rig import answer
from tests.support.rewrite import rewrite
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_moe import write_tiny_moe


@pytest.fixture
def info(tmp_path: Path) -> ModelInfo:
    return describe(write_tiny_moe(tmp_path / "moe.gguf", "qwen3moe"))


def settings_with(**fields: object) -> Settings:
    return Settings(context_tokens=256, threads=2, **fields)  # type: ignore[arg-type]


def foreign_library(_tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fit, "paging_fault", lambda: "it is another library")


def no_home(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blocked").write_text("a file in the way")
    patch.setenv("EDGELLM_HOME", str(tmp_path / "blocked"))


def unknown_use(_tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ExpertStore, "fault", "its experts are used in another way")


def unknown_graph(_tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    class Refused(context_module.Context):
        def __init__(self, model: Model, params: context_module.ContextParams) -> None:
            if model.experts is not None:
                raise ModelUnsupportedError("the graph uses an expert tensor in another way")
            super().__init__(model, params)

    patch.setattr(loaded, "Context", Refused)


FAULTS = pytest.mark.parametrize("fault", [foreign_library, no_home, unknown_use, unknown_graph])


@FAULTS
def test_it_is_mapped_where_it_fits(
    fault: object, info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = load_runner(info, settings_with(expert_memory_bytes="off"))
    tokens = answer(runner, [1, 2, 3], 5).tokens()
    runner.close()
    fault(tmp_path, monkeypatch)  # type: ignore[operator]
    runner = load_runner(info, settings_with())
    assert runner.pager is None
    assert runner.model.experts is None
    assert answer(runner, [1, 2, 3], 5).tokens() == tokens
    runner.close()
    (warning,) = [record.message for record in caplog.records if "llama.cpp maps the file" in record.message]
    assert warning.startswith("moe.gguf: its experts are not paged")


@FAULTS
@pytest.mark.parametrize("asked", [{"expert_memory_bytes": 1 << 20}, {"expert_checksums": "on"}])
def test_it_is_refused_where_paging_was_asked_for(
    fault: object, asked: dict[str, object], info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(tmp_path, monkeypatch)  # type: ignore[operator]
    with pytest.raises((ModelLoadError, ModelUnsupportedError)):
        load_runner(info, settings_with(**asked))


@FAULTS
def test_it_is_refused_where_it_does_not_fit(
    fault: object, info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(tmp_path, monkeypatch)  # type: ignore[operator]
    settings = settings_with()
    whole = whole_memory(info, settings).total_bytes
    with pytest.raises((ModelLoadError, ModelUnsupportedError)):
        _load(info, settings, whole - 1)
    _load(info, settings, whole).close()


def _load(info: ModelInfo, settings: Settings, room_bytes: int) -> Runner:
    return load_runner(info, settings, plan_load(info, settings, room_bytes))


def test_separate_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A size is refused; otherwise they are llama.cpp's affair, whose word on them is no."""
    stacked = write_tiny_llama(tmp_path / "new.gguf", experts=4)
    old = describe(rewrite(stacked, tmp_path / "old.gguf", separate=True))
    with pytest.raises(ModelUnsupportedError, match="Convert the model anew"):
        load_runner(old, settings_with(expert_memory_bytes=1 << 20))
    assert plan_load(old, settings_with()).memory.expert_bytes is None
    assert "Convert the model anew" in caplog.text
    for value in ("auto", "off"):
        with pytest.raises(ModelLoadError, match=r"could not load old\.gguf"):
            load_runner(old, settings_with(expert_memory_bytes=value))


def test_a_size_is_for_models_with_experts(tmp_path: Path) -> None:
    info = describe(write_tiny_llama(tmp_path / "dense.gguf"))
    runner = load_runner(info, settings_with(expert_memory_bytes=1 << 20))
    assert runner.pager is None
    runner.close()


def test_headers_are_read_once_for_a_load(info: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    read, count = gguf._HeaderReader.read, []

    def counted(reader: gguf._HeaderReader) -> gguf.GGUFHeader:
        count.append(1)
        return read(reader)

    monkeypatch.setattr(gguf._HeaderReader, "read", counted)
    load_runner(info, settings_with(expert_checksums="on")).close()
    assert len(count) == 1
    plan = plan_load(info, settings_with())
    load_runner(info, settings_with(), plan).close()
    assert len(count) == 2


def test_what_a_load_has_opened_is_closed_if_it_fails(info: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    for kind in (context_module.Context, Model):

        def close(thing: object, real=kind.close, name: str = kind.__name__) -> None:
            real(thing)
            closed.append(name)

        monkeypatch.setattr(kind, "close", close)

    def fail(*_: object, **__: object) -> None:
        raise KeyError

    monkeypatch.setattr(loaded, "Pager", fail)
    with pytest.raises(KeyError):
        load_runner(info, settings_with())
    assert closed == ["Context", "Model"]
