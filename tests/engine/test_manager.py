"""Which models are in memory, who may use them, and when they leave."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import edgellm.engine.manager as manager_module
from edgellm.config import Settings
from edgellm.engine.engine import Engine
from edgellm.engine.fit import plan_load
from edgellm.engine.manager import ModelManager
from edgellm.engine.types import AdapterUse
from edgellm.errors import (
    AdapterError,
    AdapterNotFoundError,
    ConfigError,
    InvalidModelFileError,
    ModelNotFoundError,
    ModelTooLargeError,
    ModelUnsupportedError,
    OverloadedError,
    ShuttingDownError,
)
from edgellm.models.describe import describe
from edgellm.models.store import ModelStore, StoredModel
from tests.support.tiny_gguf import write_tiny_lora

PATIENCE_S = 30
Make = Callable[..., ModelManager]


class _Left:
    """Hears which models were unloaded; others may wait for that."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._heard = threading.Condition()

    def __call__(self, name: str) -> None:
        with self._heard:
            self.names.append(name)
            self._heard.notify_all()

    def wait_for(self, name: str) -> None:
        with self._heard:
            assert self._heard.wait_for(lambda: name in self.names, PATIENCE_S)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path, other_llama: Path, qwen: Path) -> Path:
    """A store with the models first, second and third."""
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    for name, path in (("first", llama), ("second", other_llama), ("third", qwen)):
        shutil.copy(path, tmp_path / "models" / f"{name}.gguf")
    return tmp_path


@pytest.fixture
def left() -> _Left:
    return _Left()


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


@pytest.fixture
def make(home: Path, engine: Engine, left: _Left) -> Iterator[Make]:
    made: list[ModelManager] = []

    def manager(**settings: object) -> ModelManager:
        chosen = _settings(**settings)
        made.append(ModelManager(chosen, ModelStore(home), engine, "first", on_unload=left))
        return made[-1]

    yield manager
    for one in made:
        one.close()


def _settings(**fields: object) -> Settings:
    return Settings(**({"context_tokens": 256, "parallel": 2, "threads": 1} | fields))  # type: ignore[arg-type]


def _needs(home: Path, name: str) -> int:
    return plan_load(describe(home / "models" / f"{name}.gguf"), _settings()).memory.total_bytes


def _model(manager: ModelManager, name: str) -> StoredModel:
    return manager.resolve(name)[0]


class TestNames:
    def test_default_and_case(self, make: Make) -> None:
        manager = make()
        assert manager.resolve(None)[0].name == manager.resolve("")[0].name == "first"
        assert manager.resolve("SECOND")[0].name == "second"
        assert [model.name for model in manager.models()][:1] == ["first"]
        assert {"first", "second", "third"} <= {model.name for model in manager.models()}

    def test_the_settings_choose_the_default(self, make: Make, llama: Path) -> None:
        manager = make(model=(str(llama), "second"))
        assert manager.default == "llama"
        assert [model.name for model in manager.models()][:2] == ["llama", "second"]

    def test_unknown_names_and_paths(self, make: Make, home: Path, llama: Path) -> None:
        manager = make()
        for name in ("nobody", str(llama), "models/first.gguf", "../first", "first.gguf", "./first"):
            with pytest.raises(ModelNotFoundError):
                manager.resolve(name)

    def test_an_unknown_model_in_the_settings(self, make: Make) -> None:
        with pytest.raises(ModelNotFoundError):
            make(model=("nobody",))


class TestLoading:
    def test_once_for_many(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        manager, loads = make(), []
        load = manager_module.load_runner
        monkeypatch.setattr(manager_module, "load_runner", lambda *args: (loads.append(1), load(*args))[1])
        barrier = threading.Barrier(6)

        def ask(_number: int) -> object:
            barrier.wait(PATIENCE_S)
            loaded = manager.acquire(_model(manager, "second"))
            manager.release(loaded)
            return loaded

        with ThreadPoolExecutor(6) as pool:
            assert len(set(map(id, pool.map(ask, range(6))))) == 1
        assert len(loads) == 1

    def test_acquire_loaded(self, make: Make) -> None:
        manager = make()
        assert manager.acquire_loaded("first") is None
        with manager.use(_model(manager, "first")) as loaded:
            assert manager.acquire_loaded("first") is loaded
            assert loaded.leases == 2
            manager.release(loaded)
        assert loaded.leases == 0
        assert [one.name for one in manager.loaded()] == ["first"]

    def test_a_deleted_file(self, make: Make, home: Path) -> None:
        manager = make()
        model = _model(manager, "second")
        (home / "models" / "second.gguf").unlink()
        with pytest.raises(ModelNotFoundError, match="gone"):
            manager.acquire(model)

    def test_a_file_that_is_not_a_model(self, make: Make, home: Path, loras: dict[str, Path]) -> None:
        manager = make()
        (home / "models" / "broken.gguf").write_bytes(b"GGUF but not for long")
        shutil.copy(loras["one"], home / "models" / "lora.gguf")
        for _ in range(2):  # and the second try does not wait for the first
            with pytest.raises(InvalidModelFileError):
                manager.acquire(_model(manager, "broken"))
        with pytest.raises(ModelUnsupportedError, match="adapter"):
            manager.acquire(_model(manager, "lora"))

    def test_the_queue_has_an_end(self, make: Make) -> None:
        manager = make(parallel=2, queue_limit=1)
        model = _model(manager, "first")
        leases = [manager.acquire(model) for _ in range(3)]
        for attempt in (manager.acquire, lambda model: manager.acquire_loaded(model.name)):
            with pytest.raises(OverloadedError, match="3 requests"):
                attempt(model)
        manager.release(leases[0])
        manager.acquire(model)

    def test_nothing_is_handed_out_after_close(self, make: Make) -> None:
        manager = make()
        manager.close()
        with pytest.raises(ShuttingDownError):
            manager.acquire(_model(manager, "first"))


class TestMemory:
    def test_a_model_too_large_is_refused_before_it_is_loaded(
        self, make: Make, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manager = make(memory_budget_bytes=1 << 20)
        monkeypatch.setattr(manager_module, "load_runner", lambda *_: pytest.fail("it was loaded"))
        with pytest.raises(ModelTooLargeError) as caught:
            manager.acquire(_model(manager, "second"))
        assert caught.value.budget_bytes == 1 << 20
        assert caught.value.needed_bytes == _needs(home, "second")
        assert f"{_needs(home, 'second') >> 20} MiB" in str(caught.value)

    def test_the_least_recently_used_makes_room(self, make: Make, home: Path, left: _Left) -> None:
        needs = {name: _needs(home, name) for name in ("first", "second", "third")}
        manager = make(memory_budget_bytes=sum(needs.values()) - 1)
        for name in ("second", "first", "second"):
            with manager.use(_model(manager, name)):
                pass
        with manager.use(_model(manager, "third")):
            assert {one.name for one in manager.loaded()} == {"second", "third"}
        assert left.names == ["first"]
        with manager.use(_model(manager, "first")):  # and it comes back
            assert left.names == ["first", "second"]

    def test_models_in_use_stay(self, make: Make, home: Path, left: _Left) -> None:
        manager = make(memory_budget_bytes=_needs(home, "first") + _needs(home, "second") - 1)
        with manager.use(_model(manager, "first")), pytest.raises(OverloadedError, match="in use"):
            manager.acquire(_model(manager, "second"))
        assert left.names == []
        with manager.use(_model(manager, "second")):
            assert left.names == ["first"]

    def test_an_idle_model_is_unloaded_but_for_the_default(self, make: Make, left: _Left) -> None:
        manager = make(keep_alive_s=0.05)
        with manager.use(_model(manager, "first")), manager.use(_model(manager, "second")) as second:
            manager.embedder(second)
        left.wait_for("second")
        assert [one.name for one in manager.loaded()] == ["first"]

    def test_a_leased_model_is_not_idle(self, make: Make, left: _Left) -> None:
        manager = make(keep_alive_s=0)
        with manager.use(_model(manager, "second")):
            with manager.use(_model(manager, "third")):
                pass
            left.wait_for("third")
            assert {one.name for one in manager.loaded()} == {"second"}
        left.wait_for("second")


class TestEmbedder:
    def test_one_for_many_threads(self, make: Make, engine: Engine) -> None:
        manager = make()
        barrier = threading.Barrier(4)
        with manager.use(_model(manager, "first")) as loaded:

            def ask(_number: int) -> object:
                barrier.wait(PATIENCE_S)
                return manager.embedder(loaded)

            with ThreadPoolExecutor(4) as pool:
                assert len(set(map(id, pool.map(ask, range(4))))) == 1
            assert len(engine._workers) == 2  # the runner and one embedder


class TestAdapters:
    def test_a_name_stands_for_its_base_with_it(self, make: Make, loras: dict[str, Path]) -> None:
        manager = make()
        record = manager.load_adapter("tone", loras["one"], "first", scale=0.5)
        assert (record.name, record.model, record.scale) == ("tone", "first", 0.5)
        model, uses = manager.resolve("tone")
        assert (model.name, uses) == ("first", (AdapterUse("tone"),))
        assert manager.scaled((AdapterUse("tone", 3.0),)) == (AdapterUse("tone", 1.5),)
        assert manager.adapters() == [record]
        manager.unload_adapter("tone")
        assert manager.adapters() == []
        with pytest.raises(ModelNotFoundError):
            manager.resolve("tone")
        for attempt in (lambda: manager.unload_adapter("tone"), lambda: manager.scaled((AdapterUse("tone"),))):
            with pytest.raises(AdapterNotFoundError):
                attempt()

    def test_it_returns_with_its_model(self, make: Make, left: _Left, loras: dict[str, Path]) -> None:
        manager = make(keep_alive_s=0)
        manager.load_adapter("tone", loras["one"], "second")
        left.wait_for("second")
        with manager.use(_model(manager, "second")) as loaded:
            assert set(loaded.runner.adapters) == {"tone"}

    def test_one_that_is_registered_loads_nothing(self, make: Make, loras: dict[str, Path]) -> None:
        manager = make()
        second = _model(manager, "second")
        record = manager.register_adapter("ft:x", loras["one"], second, owner="local", created=5)
        assert (record.owner, record.created, manager.loaded()) == ("local", 5, [])
        with manager.use(second) as loaded:
            assert set(loaded.runner.adapters) == {"ft:x"}
            manager.register_adapter("ft:y", loras["two"], second, owner="local", created=6)
            assert set(loaded.runner.adapters) == {"ft:x", "ft:y"}
            assert loaded.leases == 1
        with pytest.raises(AdapterError, match="architecture"):
            manager.register_adapter("ft:z", loras["one"], _model(manager, "third"), owner="local", created=7)

    def test_one_that_is_registered_while_its_model_is_loaded_is_attached(
        self, make: Make, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if the load had already listed the adapters that it attaches."""
        manager = make()
        second = _model(manager, "second")
        manager.register_adapter("ft:x", loras["one"], second, owner="local", created=5)
        attach_again, made = manager._attach_again, []

        def meanwhile(*arguments: object) -> None:
            attach_again(*arguments)  # type: ignore[arg-type]
            register = threading.Thread(
                target=lambda: manager.register_adapter("ft:y", loras["two"], second, owner="local", created=6)
            )
            register.start()
            made.append(register)

        monkeypatch.setattr(manager, "_attach_again", meanwhile)
        with manager.use(second) as loaded:
            made[0].join(PATIENCE_S)
            assert set(loaded.runner.adapters) == {"ft:x", "ft:y"}

    @pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-40])])
    def test_an_adapter_whose_file_went_or_broke_is_withdrawn_and_its_model_serves_on(
        self, make: Make, left: _Left, tmp_path: Path, llama: Path, spoil: Callable[[Path], object]
    ) -> None:
        manager = make(keep_alive_s=0, model=("third",))
        path = write_tiny_lora(tmp_path / "soon-bad.gguf", llama)
        manager.load_adapter("tone", path, "first")
        left.wait_for("first")
        spoil(path)
        with manager.use(_model(manager, "first")) as loaded:
            assert not loaded.runner.adapters
        assert manager.adapters() == []

    def test_a_model_answers_to_what_the_settings_call_it(self, make: Make, tmp_path: Path, llama: Path) -> None:
        pulled = tmp_path / "models" / "owner" / "Some-GGUF"
        pulled.mkdir(parents=True)
        (pulled / "some-q4_0.gguf").write_bytes(llama.read_bytes())
        path = tmp_path / "here.gguf"
        path.write_bytes(llama.read_bytes())
        manager = make(model=("owner/some-gguf", str(path)))
        assert manager.resolve("Owner/Some-GGUF")[0] == manager.resolve(None)[0]
        assert manager.full_name("owner/some-gguf") == manager.default != "owner/some-gguf"
        with pytest.raises(ModelNotFoundError):
            manager.resolve(str(path))

    def test_two_models_of_one_name_are_refused(self, make: Make, tmp_path: Path, llama: Path) -> None:
        (tmp_path / "other").mkdir()
        paths = [tmp_path / "same.gguf", tmp_path / "other" / "same.gguf"]
        for path in paths:
            path.write_bytes(llama.read_bytes())
        with pytest.raises(ConfigError, match="two models are called"):
            make(model=tuple(map(str, paths)))

    def test_what_is_refused(self, make: Make, llama: Path, loras: dict[str, Path], tmp_path: Path) -> None:
        manager = make()
        with pytest.raises(AdapterError, match="architecture llama"):
            manager.load_adapter("tone", loras["one"], "third")
        with pytest.raises(AdapterError, match="not a LoRA adapter"):
            manager.load_adapter("tone", llama, "first")
        with pytest.raises(AdapterError, match="name of a model"):
            manager.load_adapter("Second", loras["one"], "first")
        with pytest.raises(AdapterError, match="no adapter file"):
            manager.load_adapter("tone", tmp_path / "nowhere.gguf", "first")
        with pytest.raises(ModelNotFoundError):
            manager.load_adapter("tone", loras["one"], "nobody")
        assert manager.adapters() == []
