"""A server whose drafter adapts: what it keeps, what becomes of it, and what is left when it has to forget."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

pytest.importorskip("torch")

from edgellm.backend.model import VocabFile
from edgellm.config import load_settings
from edgellm.speculative.buffer import AnswerBuffer, Record
from edgellm.speculative.ngram_cache import vocabulary_fingerprint
from edgellm.speculative.places import file_mark, merged_path
from edgellm.tune.adapting import ANSWERS_NEW
from edgellm.tune.merge import merge_adapter
from serving import adaptation as adaptation_module
from tests.serving.server import Server, run_edgellm, serving, wait_until
from tests.serving.test_drafts import make_rows_free
from tests.support.tiny_gguf import write_tiny_llama, write_tiny_lora

Models = tuple[Path, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    return write_tiny_llama(folder / "target.gguf", seed=1), write_tiny_llama(folder / "drafter.gguf", seed=2, layers=2)


def options(models: Models, *more: str) -> tuple[str, ...]:
    return "--model", str(models[0]), "--draft", str(models[1]), *more


def ask(server: Server, number: int, **fields: object) -> dict:
    body = {"prompt": f"hello {number}", "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def answers(home: Path, models: Models) -> list[Record]:
    vocab = VocabFile(models[0])
    mark = vocabulary_fingerprint(vocab.vocab)
    vocab.close()
    return AnswerBuffer(home / "speculative" / "target" / "answers", mark).read()


def adaptations(server: Server) -> float:
    return sum(
        server.metric("edgellm_drafter_adaptations_total", model="target", result=result)
        for result in ("taken", "dropped", "failed")
    )


def adapter_of(home: Path, models: Models) -> Path:
    return home / "speculative" / "target" / f"drafter-{file_mark(models[1])}.gguf"


def test_a_drafter_is_adapted_once_nobody_waits(tmp_path: Path, models: Models) -> None:
    home = tmp_path / "home"
    with serving(home, *options(models, "--adapt-after", "0s")) as server:
        assert adaptations(server) == 0
        for number in range(ANSWERS_NEW // 8):
            ask(server, number, n=8, temperature=1.0)
        wait_until(lambda: adaptations(server) > 0, "an adaptation", 180)
        assert server.metric("edgellm_drafter_adaptations_total", model="target", result="failed") == 0
        assert server.metric("edgellm_drafter_adaptation_cpu_seconds_total", model="target") > 0
        told = run_edgellm(home, "spec", "stats", "--url", server.url)
        assert "drafter: 1 adaptation," in told.stdout
        assert "accepted on answers held out" in told.stdout
        server.terminate()
        assert server.wait() == 0
    kept = home / "speculative" / "target"
    assert stat.S_IMODE((kept / "answers").stat().st_mode) == 0o600
    with serving(home, *options(models)) as server:  # what was learned has survived
        assert adaptations(server) == 1
        assert server.delete("/v1/drafts").status_code == 200
        assert adaptations(server) == 0
        assert not kept.exists()


def test_answers_are_kept_with_the_ends_of_their_prompts(tmp_path: Path, models: Models) -> None:
    home = tmp_path / "home"
    with serving(home, *options(models)) as server:
        found = ask(server, 1, n=2, temperature=1.0)
        ask(server, 2, max_tokens=4)  # too short to learn from
        server.terminate()
        assert server.wait() == 0
    vocab = VocabFile(models[0])
    kept = answers(home, models)
    texts = [b"".join(map(vocab.vocab.piece, record.answer)).decode(errors="replace") for record in kept]
    prompt = vocab.vocab.tokenize("hello 1", add_special=True, parse_special=True)
    vocab.close()
    assert sorted(texts) == sorted(choice["text"] for choice in found["choices"])
    assert [list(record.prompt) for record in kept] == [prompt] * 2


def test_answers_of_before_a_restart_are_drafted_from(tmp_path: Path, models: Models) -> None:
    home = tmp_path / "home"
    with serving(home, *options(models)) as server:
        before = ask(server, 1, max_tokens=40)
        server.terminate()
        assert server.wait() == 0
    make_rows_free(home)
    with serving(home, *options(models)) as server:
        after = ask(server, 1, max_tokens=40)
        assert server.metric("edgellm_draft_accepted_tokens_total", proposer="lookup") > 20
    assert after["choices"][0]["text"] == before["choices"][0]["text"]


@pytest.mark.parametrize("how", ["off", "no drafter"])
def test_nothing_is_kept_where_nothing_adapts(tmp_path: Path, models: Models, how: str) -> None:
    home = tmp_path / "home"
    given = options(models, "--adapt", "off") if how == "off" else ("--model", str(models[0]))
    with serving(home, *given) as server:
        ask(server, 1)
        server.terminate()
        assert server.wait() == 0
    assert [path.name for path in home.glob("speculative/*/*")] == ["learned.json"]


def test_an_adapter_of_the_drafter_is_used_and_forgotten(tmp_path: Path, models: Models) -> None:
    home = tmp_path / "home"
    path = adapter_of(home, models)
    path.parent.mkdir(parents=True)
    write_tiny_lora(path, models[1])
    merge_adapter(models[1], path, merged_path(path))
    path.with_suffix(".json").write_text(json.dumps({"version": 1, "taken": 1, "acceptance_after": 0.5}))
    with serving(home, *options(models)) as server:
        assert f"{merged_path(path).name} drafts for" in server.log.read_text()
        text = ask(server, 1)["choices"][0]["text"]
        assert server.metric("edgellm_drafter_acceptance", model="target", adapter="in use") == 0.5
        assert server.delete("/v1/drafts").status_code == 200
        assert ask(server, 1)["choices"][0]["text"] == text
        assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no GGUF at all"])
def test_an_unsound_adapter_is_no_obstacle(tmp_path: Path, models: Models, content: bytes) -> None:
    home = tmp_path / "home"
    path = merged_path(adapter_of(home, models))
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with serving(home, *options(models)) as server:
        assert ask(server, 1)["choices"]
        assert "as if it had learned nothing" in server.log.read_text()


@pytest.mark.parametrize(("after", "begins"), [("30s", False), ("0s", True)])
def test_other_programs_are_waited_for_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str, begins: bool
) -> None:
    class Busy:
        def look(self) -> bool:
            return False

    monkeypatch.setattr(adaptation_module, "MachineRest", Busy)
    settings = load_settings(adapt_after_s=after)
    found = adaptation_module.Adaptation(
        settings,
        tmp_path,
        None,
        None,
        quiet_s=lambda: 1000.0,
        training=lambda: False,  # type: ignore[arg-type]
    )
    assert found._adapting._idle() is begins
