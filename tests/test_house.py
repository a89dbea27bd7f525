"""What must hold of the project as a whole: its names, its versions, its documents, its imports."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import edgellm
from edgellm.config import Settings

ROOT = Path(__file__).resolve().parents[1]


def test_the_changelog_names_the_version() -> None:
    assert f"## {edgellm.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_tree_in_the_readme_is_true() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "readme_tree", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_documents_that_the_readme_names_are_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_wheel_holds_exactly_our_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name.split("/")[0]}
    assert top == {"edgellm", "serving", "guards"}
    assert "edgellm/py.typed" in names
    assert {
        f"guards/model/{name}" for name in ("first.onnx", "rest.onnx", "ngrams.npz", "tokenizer.json", "card.json")
    } <= set(names)


def test_every_setting_has_a_help_text() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_llama_cpp_is_pinned_to_the_version_that_the_backend_expects() -> None:
    from edgellm.backend.library import EXPECTED_VERSION

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"llama-cpp-python=={EXPECTED_VERSION}" in project["dependencies"]


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("serving.cli.app", {"llama_cpp", "fastapi", "uvicorn", "torch", "huggingface_hub", "onnxruntime"}),
        ("serving.cli.guard_eval", {"llama_cpp", "fastapi", "torch", "transformers", "huggingface_hub"}),
        ("serving.cli.serve", {"torch", "transformers", "peft", "huggingface_hub"}),
        ("edgellm.tune.architecture", {"llama_cpp", "torch", "transformers", "peft"}),
        ("serving.cli.draft_run", {"torch", "transformers", "peft", "fastapi"}),
    ],
)
def test_imports_stay_light(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert unwanted & set(done.stdout.split()) == set()
