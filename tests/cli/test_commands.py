"""The command `edgellm` as a process: help, conversation, benchmark, and where settings come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgellm import __version__
from serving.refusals import REFUSAL
from tests.serving.server import run_edgellm, serving
from tests.support.tiny_gguf import write_tiny_llama

COMMANDS = [(), ("serve",), ("chat",), ("bench",), ("models",)]
COMMANDS += [("tune",), ("tune", "plan"), ("draft",), ("draft", "make")]
COMMANDS += [("guard",), ("guard", "check"), ("guard", "eval")]
COMMANDS += [("models", name) for name in ("list", "pull", "show", "rm")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", context=2048)


def test_the_version(tmp_path):
    done = run_edgellm(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"edgellm {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(tmp_path, command):
    done = run_edgellm(tmp_path, *command, "--help")
    assert done.returncode == 0
    assert "Usage: edgellm" in done.stdout
    assert done.stderr == ""


def test_an_unknown_command_or_option_is_2(tmp_path):
    assert run_edgellm(tmp_path, "sevre").returncode == 2
    assert run_edgellm(tmp_path, "serve", "--prot", "1").returncode == 2


def test_chat_answers_what_is_piped_in(tmp_path):
    lines = "Say hello.\n/reset\n/nonsense\nAnd again: größer?\n/exit\nnever read\n"
    done = run_edgellm(tmp_path, "chat", "--max-tokens", "8", "--temperature", "0", "-s", "Be brief.", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "starts over" in done.stdout
    assert len(done.stdout.split()) > 6


def test_chat_is_guarded(tmp_path, model):
    rules = {"EDGELLM_GUARD_BLOCK": "zorkmid", "EDGELLM_GUARD_ALLOW": "re:.+"}
    arguments = ("chat", "-m", str(model), "--max-tokens", "3", "--temperature", "0")
    lines = "Tell me of bread.\nTell me of the zorkmid.\nOf the zorkmid!\n/exit\n"
    done = run_edgellm(tmp_path, *arguments, stdin=lines, env=rules)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(REFUSAL) == 2
    assert not done.stdout.startswith(REFUSAL)
    done = run_edgellm(tmp_path, *arguments, "--guard", "annotate", stdin=lines, env=rules)
    assert (done.stdout.count("holds this for unsafe (1.00)"), REFUSAL in done.stdout) == (2, False)
    done = run_edgellm(tmp_path, *arguments, "--guard", "off", stdin=lines, env=rules)
    assert "unsafe" not in done.stdout
    assert REFUSAL not in done.stdout


def test_chat_ends_with_its_input(tmp_path, model):
    done = run_edgellm(tmp_path, "chat", "-m", str(model), "--max-tokens", "3", stdin="hi")
    assert done.returncode == 0, done.stderr


def test_chat_with_a_missing_model_is_one_line(tmp_path):
    done = run_edgellm(tmp_path, "chat", "-m", "none-such", stdin="hi")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_bench_prints_one_json_object(tmp_path, model):
    arguments = ["--rounds", "1", "--tokens", "8", "--prompt-tokens", "64", "--json"]
    done = run_edgellm(tmp_path, "bench", "-m", str(model), *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "tiny"
    assert [(row["what"], row["width"]) for row in found["figures"]] == [
        ("prompt", 64),
        *(("generate", width) for width in (1, 2, 4, 8)),
    ]
    assert all(0 < row["min"] <= row["tokens_per_s"] <= row["max"] for row in found["figures"])


def _context(home: Path, model: Path, *arguments: str, **env: str) -> int:
    with serving(home, "--model", str(model), *arguments, env=env) as server:
        return server.get("/v1/models/tiny").json()["context_tokens"]


def test_the_command_line_outranks_the_environment_and_that_the_file(tmp_path, model):
    (tmp_path / "config.toml").write_text("context_tokens = 256\nlog_level = 'error'\n")
    assert _context(tmp_path, model) == 256
    assert _context(tmp_path, model, EDGELLM_CONTEXT_TOKENS="512") == 512
    assert _context(tmp_path, model, "--context-tokens", "1024", EDGELLM_CONTEXT_TOKENS="512") == 1024


@pytest.mark.parametrize("text", ["colour = 'red'", "port = 'many'", "port = ", "parallel = 0"])
def test_a_faulty_config_file_is_one_line(tmp_path, text):
    (tmp_path / "config.toml").write_text(text)
    done = run_edgellm(tmp_path, "serve")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert text.split()[0] in done.stderr or "config.toml" in done.stderr
