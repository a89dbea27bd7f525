"""The adaptation of tiny drafters, from a buffer to an adapter: in this process, and as the process that it is."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from edgellm.backend.model import VocabFile  # noqa: E402
from edgellm.errors import AdapterError, ConfigError, ModelError  # noqa: E402
from edgellm.speculative.buffer import AnswerBuffer  # noqa: E402
from edgellm.speculative.ngram_cache import vocabulary_fingerprint  # noqa: E402
from edgellm.speculative.replay import Replay  # noqa: E402
from edgellm.tune import adaptation_run as run_module  # noqa: E402
from edgellm.tune.adaptation import parse  # noqa: E402
from edgellm.tune.adaptation_run import adapt, is_better  # noqa: E402
from edgellm.tune.adaptation_spec import AdaptationSpec  # noqa: E402
from edgellm.tune.adapter_read import read_adapter  # noqa: E402
from edgellm.tune.giving_way import GivingWay  # noqa: E402
from edgellm.tune.held_out import divide  # noqa: E402
from edgellm.tune.own_process import CHILD  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama, write_tiny_lora  # noqa: E402

PHRASES = ("hello world, the user is in the name of you", "null and the world; true is false", "of you and of the name")
BROKEN = "no GGUF"


class Loose:
    """In place of GivingWay, which takes signals for the whole process."""

    folder = GivingWay.folder
    writing = GivingWay.writing

    def __init__(self) -> None:
        import threading

        self._writing, self._folder = threading.Lock(), None
        self.settled = False

    def settle(self) -> None:
        self.settled = True


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapt")
    drafter = write_tiny_llama(folder / "drafter.gguf", layers=2, seed=1)
    return drafter, write_tiny_llama(folder / "target.gguf", seed=2)


@pytest.fixture
def spec(tmp_path: Path, models: tuple[Path, Path]) -> AdaptationSpec:
    """Answers that a drafter can learn by heart: three phrases over and over, from any place on."""
    vocab = VocabFile(models[1])
    buffer = AnswerBuffer(tmp_path / "buffer" / "answers", vocabulary_fingerprint(vocab.vocab))
    for number in range(40):
        text = " ".join(PHRASES[(number + turn) % 3] for turn in range(4))[number:]
        tokens = vocab.vocab.tokenize(text, add_special=False, parse_special=False)
        buffer.append(tokens[:8], tokens[8:])
    vocab.close()
    output = tmp_path / "out" / "adapter.gguf"
    output.parent.mkdir()
    return AdaptationSpec(*models, buffer.path, output, epochs=6, learning_rate=2e-2, rank=8, top=4, batch_size=8)


@pytest.fixture
def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that was sure of what it wrote: the tiny one's weights are random, so that it holds nothing likely."""
    import numpy as np

    def likeliest(_: object, record: Any) -> Any:
        return np.array(record.answer, np.int32)[:, None], np.ones((len(record.answer), 1), np.float32)

    monkeypatch.setattr(run_module.Teacher, "likeliest", likeliest)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_better_adapter_is_published(spec: AdaptationSpec, sure: None) -> None:
    events: list[dict[str, Any]] = []
    ways = Loose()
    result = adapt(spec, events.append, ways)
    assert result.accepted, result
    assert ways.settled
    assert result.acceptance_after > result.acceptance_before + 0.2
    assert result.acceptance_before == result.acceptance_without
    assert result.tokens_per_call_after > result.tokens_per_call_before
    assert result.records == result.held_out + result.trained == 40
    assert min(result.held_out, result.steps, result.seconds, result.cpu_seconds, result.peak_rss_bytes) > 0
    assert files(spec.output.parent) == ["adapter.gguf", "adapter.merged.gguf"]
    assert stat.S_IMODE(spec.output.stat().st_mode) == 0o600
    assert [event["event"] for event in events if event["event"] not in ("asked", "step")] == [
        "data", "begun", "measured", "measured",
    ]  # fmt: skip
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == result.steps
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]


def test_it_is_trained_further_and_a_worse_one_is_dropped(spec: AdaptationSpec, sure: None) -> None:
    adapt(spec, lambda _: None, Loose())
    before = spec.output.read_bytes()
    again = replace(spec, earlier=spec.output, epochs=1, learning_rate=0.5)  # which ruins it
    events: list[dict[str, Any]] = []
    result = adapt(again, events.append, Loose())
    assert not result.accepted
    assert result.acceptance_after < result.acceptance_before
    assert result.acceptance_before > result.acceptance_without
    assert [event["adapter"] for event in events if event["event"] == "measured"] == ["none", "earlier", "new"]
    assert spec.output.read_bytes() == before
    assert files(spec.output.parent) == ["adapter.gguf", "adapter.merged.gguf"]


def test_what_changes_nothing_is_dropped(spec: AdaptationSpec) -> None:
    result = adapt(replace(spec, epochs=1, learning_rate=1e-12), lambda _: None, Loose())
    assert not result.accepted
    assert result.acceptance_after == pytest.approx(result.acceptance_before, abs=1e-3)
    assert files(spec.output.parent) == []


def test_held_out_answers_are_never_trained_on(
    spec: AdaptationSpec, sure: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt, measured = [], []
    drafted, replay = run_module.drafted, run_module.replay

    def learn(its: Any, record: Any, *rest: Any, **more: Any) -> Any:
        learnt.append(record)
        return drafted(its, record, *rest, **more)

    def measure(drafter: Any, records: Sequence[Any], *, most: int) -> Any:
        measured.extend(records)
        return replay(drafter, records, most=most)

    monkeypatch.setattr(run_module, "drafted", learn)
    monkeypatch.setattr(run_module, "replay", measure)
    adapt(replace(spec, epochs=1), lambda _: None, Loose())
    assert learnt
    assert measured
    assert not set(learnt) & set(measured)


def test_of_many_answers_the_latest_are_taken(
    spec: AdaptationSpec, models: tuple[Path, Path], sure: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = VocabFile(models[1])
    training, held_out = divide(AnswerBuffer(spec.buffer, vocabulary_fingerprint(vocab.vocab)).read())
    vocab.close()
    measured, replay = [], run_module.replay

    def measure(drafter: Any, records: Sequence[Any], *, most: int) -> Any:
        measured.append(tuple(records))
        return replay(drafter, records, most=most)

    monkeypatch.setattr(run_module, "replay", measure)
    result = adapt(replace(spec, epochs=1, answers=9, measured=2), lambda _: None, Loose())
    assert len(training) > 9
    assert (result.records, result.trained, result.held_out) == (40, 9, 2)
    assert set(measured) == {tuple(held_out[-2:])}


def test_the_same_are_held_out_whatever_else_there_is(spec: AdaptationSpec, models: tuple[Path, Path]) -> None:
    vocab = VocabFile(models[1])
    records = AnswerBuffer(spec.buffer, vocabulary_fingerprint(vocab.vocab)).read()
    vocab.close()
    training, held_out = divide(records)
    assert set(training) | set(held_out) == set(records)
    assert not set(training) & set(held_out)
    assert divide([*records, *records]) == (training, held_out)
    for one in records:
        assert divide([one]) == (([], [one]) if one in held_out else ([one], []))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_answers(spec: AdaptationSpec, models: tuple[Path, Path], count: int) -> None:
    vocab = VocabFile(models[1])
    buffer = AnswerBuffer(spec.buffer, vocabulary_fingerprint(vocab.vocab))
    vocab.close()
    buffer.clear()
    for number in range(count):
        buffer.append([1, 2], [number, 3])
    result = adapt(spec, lambda _: None, Loose())
    assert not result.accepted
    assert "too few" in result.reason
    assert result.records == count
    assert files(spec.output.parent) == []


def test_answers_of_another_model_are_left(spec: AdaptationSpec, models: tuple[Path, Path], tmp_path: Path) -> None:
    vocab = VocabFile(models[1])
    buffer = AnswerBuffer(spec.buffer, vocabulary_fingerprint(vocab.vocab))
    before = len(buffer.read())
    buffer.append([1], [vocab.vocab.n_tokens])  # a token that the target has not
    vocab.close()
    assert len(buffer.read()) == before + 1
    events: list[dict[str, Any]] = []
    adapt(replace(spec, batch_size=1000), events.append, Loose())
    assert events[0]["records"] == before


def test_the_publishing_rule() -> None:
    before = Replay(drafted=100, accepted=50, calls=50, tokens=100)
    assert is_better(before, Replay(100, 60, 40, 100), 0.05)
    assert not is_better(before, Replay(100, 54, 46, 100), 0.05)
    assert not is_better(before, Replay(20, 19, 81, 100), 0.05)  # little is drafted, and nearly all of it is right
    assert not is_better(before, before, 0.0)


def test_an_adapter_is_read_as_it_was_written(spec: AdaptationSpec, models: tuple[Path, Path], tmp_path: Path) -> None:
    from edgellm.tune.export import export_adapter
    from edgellm.tune.lora import Lora, LoraConfig
    from edgellm.tune.scheme import Site
    from edgellm.tune.weights import BaseWeights

    shape = BaseWeights(models[0]).architecture
    lora = Lora(shape, [Site(0, "attn_q"), Site(1, "ffn_down")], LoraConfig(4, 6.0), seed=3)
    with torch.no_grad():
        for tensor in lora.parameters():
            tensor.normal_()
    path = tmp_path / "a.gguf"
    export_adapter(lora, models[0], path)
    found = read_adapter(path, shape)
    assert found.config == lora.config
    assert list(found.pairs) == list(lora.pairs)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), lora.parameters(), strict=True))
    assert all(tensor.requires_grad for tensor in found.parameters())


def test_adapters_that_do_not_fit(spec: AdaptationSpec, models: tuple[Path, Path], tmp_path: Path) -> None:
    from edgellm.tune.weights import BaseWeights

    shape = BaseWeights(models[0]).architecture
    other = write_tiny_llama(tmp_path / "other.gguf", width=32, layers=2)
    third = write_tiny_llama(tmp_path / "qwen.gguf", architecture="qwen2")
    (tmp_path / "junk.gguf").write_text(BROKEN)
    nan = write_tiny_lora(tmp_path / "nan.gguf", models[0], magnitude=float("nan"))
    wrong = [write_tiny_lora(tmp_path / f"{base.stem}-lora.gguf", base) for base in (other, third)]
    for path in (*wrong, nan, tmp_path / "junk.gguf", models[0]):
        with pytest.raises(AdapterError):
            read_adapter(path, shape)
    with pytest.raises(AdapterError):
        adapt(replace(spec, earlier=wrong[0]), lambda _: None, Loose())
    assert files(spec.output.parent) == []


def test_a_model_that_is_none(spec: AdaptationSpec, tmp_path: Path) -> None:
    (tmp_path / "junk.gguf").write_text(BROKEN)
    for wrong in (replace(spec, drafter=tmp_path / "junk.gguf"), replace(spec, target=tmp_path / "junk.gguf")):
        with pytest.raises(ModelError):
            adapt(wrong, lambda _: None, Loose())


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"rank": -1}, {"threads": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")},
     {"margin": -0.1}, {"margin": 1.0}, {"sparsity": "auto"}, {"sparsity": "some"}],
)  # fmt: skip
def test_numbers_that_make_no_adaptation(spec: AdaptationSpec, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(spec, **wrong)


def command(spec: AdaptationSpec, *more: str) -> list[str]:
    of = {"drafter": spec.drafter, "target": spec.target, "buffer": spec.buffer, "output": spec.output}
    flags = [word for name, path in of.items() for word in (f"--{name}", str(path))]
    return [*flags, "--learning-rate", "0.02", "--rank", "8", "--batch-size", "8", *more]


def start(spec: AdaptationSpec, *more: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "edgellm.tune.adaptation", *command(spec, *more)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_options_are_the_fields(spec: AdaptationSpec) -> None:
    found = parse(command(spec, "--from", "old.gguf", "--recompute", "--row-tokens", "99", "--margin", "0.5"))
    assert (found.earlier, found.recompute, found.row_tokens, found.margin) == (Path("old.gguf"), True, 99, 0.5)
    assert (found.drafter, found.output, found.rank, found.top) == (spec.drafter, spec.output, 8, 0)
    assert parse(command(spec)).earlier is None


def test_the_process_tells_what_it_does(spec: AdaptationSpec) -> None:
    process = start(spec, "--epochs", "2")
    out, _ = process.communicate()
    assert process.returncode == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["event"] == "data"
    assert events[-1]["event"] == "done"
    assert events[-1]["accepted"] == spec.output.exists()
    assert {"acceptance_before", "acceptance_after", "cpu_seconds", "peak_rss_bytes", "held_out"} <= events[-1].keys()
    assert files(spec.output.parent) == (["adapter.gguf", "adapter.merged.gguf"] if events[-1]["accepted"] else [])


def test_the_process_says_why_it_fails(spec: AdaptationSpec, tmp_path: Path) -> None:
    (tmp_path / "junk.gguf").write_text(BROKEN)
    process = start(spec, "--drafter", str(tmp_path / "junk.gguf"))
    out, _ = process.communicate()
    assert process.returncode == 1
    assert json.loads(out.splitlines()[-1])["code"] == "model_unsupported"


@pytest.mark.parametrize(
    ("when", "how"),
    [("data", "SIGTERM"), ("asked", "SIGTERM"), ("begun", "SIGTERM"), ("step", "SIGTERM"),
     ("step", "SIGINT"), ("asked", "stop"), ("step", "gone")],
)  # fmt: skip
def test_it_gives_way(spec: AdaptationSpec, when: str, how: str) -> None:
    process = start(spec, "--epochs", "1000000", **({CHILD: "1"} if how in ("stop", "gone") else {}))
    assert process.stdin is not None
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == when:
            break
    if how == "stop":
        process.stdin.write("stop\n")
        process.stdin.flush()
    elif how == "gone":
        process.stdin.close()
    else:
        process.send_signal(getattr(signal, how))
    left = [json.loads(line)["event"] for line in process.stdout]
    assert process.wait() == 0
    assert left[-1] == "stopped"
    assert left.count("step") < 1000
    assert files(spec.output.parent) == []
    process.stdout.close()
    if not process.stdin.closed:
        process.stdin.close()


def test_what_a_killed_process_has_left_goes(spec: AdaptationSpec, sure: None) -> None:
    left = spec.output.parent / f".{spec.output.name}.adapting"
    left.mkdir()
    (left / ".writing-x").write_text("half")
    assert adapt(spec, lambda _: None, Loose()).accepted
    assert files(spec.output.parent) == ["adapter.gguf", "adapter.merged.gguf"]
