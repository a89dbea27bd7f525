"""scripts/lib/env.sh on a small project of its own: real environments, real pip; no network, no compiling."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "edgellm"
version = "1.0"
"""

# A build backend that needs nothing: an editable wheel with one console script, which prints its arguments.
BACKEND = """
import os, pathlib, zipfile

def build_editable(directory, config_settings=None, metadata_directory=None):
    if os.environ.get("BREAK_THE_BUILD"):
        raise SystemExit("the compiler caught fire")
    info, name = "edgellm-1.0.dist-info", "edgellm-1.0-py3-none-any.whl"
    files = {
        "edgellm_path.pth": os.getcwd(),
        f"{info}/METADATA": "Metadata-Version: 2.1\\nName: edgellm\\nVersion: 1.0\\nProvides-Extra: dev\\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        f"{info}/entry_points.txt": "[console_scripts]\\nedgellm = command:main\\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(pathlib.Path(directory) / name, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return name
"""

COMMAND = "import sys\n\ndef main():\n    print('ran:', *sys.argv[1:])\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A checkout under a path with a space, and its first scripts/serve. Shared by the tests, in the order below."""
    root = tmp_path_factory.mktemp("scripts") / "my checkout"
    shutil.copytree(SCRIPTS, root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in {"pyproject.toml": PYPROJECT, "backend.py": BACKEND, "command.py": COMMAND}.items():
        (root / name).write_text(text)
    return root, run(root, "serve", "--port", "1 2")


def run(root: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script, run from elsewhere, with this interpreter unless told otherwise."""
    environment = {**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1", **variables}
    command = [str(root / "scripts" / script), *arguments]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False, timeout=120)


def state(root: Path) -> tuple[str, int]:
    """The stamp's text and time of writing."""
    stamp = root / ".venv/edgellm-stamp"
    return stamp.read_text(), stamp.stat().st_mtime_ns


def test_first_run_installs_and_passes_arguments_on(
    installed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    root, first = installed
    assert first.returncode == 0, first.stderr
    assert first.stdout == "ran: serve --port 1 2\n"
    assert "several minutes" in first.stderr
    assert (root / ".venv/edgellm-install.log").stat().st_size > 0
    assert not (root / ".venv/edgellm-installing").exists()


def test_second_run_does_nothing_but_run(installed: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    root, _ = installed
    before = state(root)
    again = run(root, "serve", PYTHON="")
    assert (again.stdout, again.stderr) == ("ran: serve\n", "")
    assert state(root) == before


def test_changed_pyproject_and_new_extras_are_installed_in_place(
    installed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    root, _ = installed
    witness = root / ".venv/witness"
    witness.touch()
    (root / "pyproject.toml").write_text(PYPROJECT + "description = 'changed'\n")
    changed = run(root, "serve")
    assert changed.returncode == 0, changed.stderr
    assert "Ready." in changed.stderr
    assert state(root)[0].splitlines()[3] == "base"
    run(root, "test", "--version")  # pytest itself is not there: only the set-up matters
    assert state(root)[0].splitlines()[3] == "dev"
    assert run(root, "serve").stderr == ""  # what has the tools will do for serving
    assert witness.exists()


def test_changed_native_code_is_built_again(installed: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    root, _ = installed
    (root / "kernels").mkdir()
    (root / "kernels/code.cpp").write_text("int answer = 41;\n")
    assert "Ready." in run(root, "serve").stderr
    assert run(root, "serve").stderr == ""
    (root / "kernels/code.cpp").write_text("int answer = 42;\n")
    assert "Ready." in run(root, "serve").stderr


def test_failed_install_shows_the_log_and_is_not_taken_for_done(
    installed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    root, _ = installed
    (root / "pyproject.toml").write_text(PYPROJECT + "description = 'changed again'\n")
    failed = run(root, "serve", BREAK_THE_BUILD="1")
    assert failed.returncode == 1
    assert "the compiler caught fire" in failed.stderr
    assert failed.stderr.rstrip().splitlines()[-1].startswith("error: the installation failed")
    assert not (root / ".venv/edgellm-stamp").exists()


def test_moved_and_interrupted_checkout_gets_a_new_environment(
    installed: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    root, _ = installed
    moved = tmp_path / "moved"
    shutil.copytree(root, moved, symlinks=True)
    (moved / ".venv/witness").touch()
    (moved / ".venv/edgellm-installing").unlink(missing_ok=True)
    (moved / ".venv/edgellm-stamp").write_text(f"{root}\n/somewhere/python3.11\n/somewhere/python3\nbase\n0\n")
    outcome = run(moved, "serve", "here")
    assert outcome.stdout == "ran: serve here\n", outcome.stderr
    assert "was moved" in outcome.stderr
    assert not (moved / ".venv/witness").exists()

    (moved / ".venv/edgellm-installing").touch()
    failed = run(moved, "serve", PYTHON="/no/such/python")
    assert failed.returncode == 1
    assert "interrupted" in failed.stderr
    assert "Python 3.11 or newer" in failed.stderr


def test_two_first_runs_at_once_install_once(
    installed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    root, _ = installed
    if shutil.which("flock") is None:
        pytest.skip("this system has no flock")
    (root / ".venv/edgellm-stamp").unlink(missing_ok=True)
    (root / ".venv/edgellm-installing").unlink(missing_ok=True)
    (root / "pyproject.toml").write_text(PYPROJECT)
    environment = {**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1"}
    pair = [
        subprocess.Popen(
            [str(root / "scripts/serve")], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [out for out, _ in outputs] == ["ran: serve\n"] * 2, outputs
    assert sum(err.count("Installing edgellm") for _, err in outputs) == 1


@pytest.mark.parametrize(("variable", "value", "hint"), [("CXX", "/bin/false", "g++"), ("CC", "no-such-cc", "g++")])
def test_missing_compiler_is_named_before_anything_is_made(
    tmp_path: Path, variable: str, value: str, hint: str
) -> None:
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    outcome = run(tmp_path, "serve", **{variable: value})
    assert outcome.returncode == 1
    assert outcome.stderr.count("\n") == 1
    assert value in outcome.stderr
    assert hint in outcome.stderr
    assert not (tmp_path / ".venv").exists()


def test_missing_headers_are_named_before_anything_is_made(tmp_path: Path) -> None:
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    bare = tmp_path / "python-bare"
    bare.write_text(f'#!/bin/sh\ncase "$*" in *Python.h*) exit 1 ;; esac\nexec {sys.executable} "$@"\n')
    bare.chmod(0o755)
    outcome = run(tmp_path, "serve", PYTHON=str(bare))
    assert outcome.returncode == 1
    assert "without its headers" in outcome.stderr
    assert "python3-dev" in outcome.stderr
    assert not (tmp_path / ".venv").exists()


def test_old_python_is_refused_with_its_version(tmp_path: Path) -> None:
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    outcome = run(tmp_path, "serve", PYTHON=str(old))
    assert outcome.returncode == 1
    assert "found: Python 3.9.2" in outcome.stderr
    assert not (tmp_path / ".venv").exists()
