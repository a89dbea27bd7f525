"""A whole run in a process of its own: from a data file to an adapter that llama.cpp loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.support.tiny_gguf import write_tiny_llama
from tests.tune.rig import divergence, true_logits


def run(**spec: object) -> tuple[int, list[dict[str, Any]]]:
    """The process's status and its events."""
    done = subprocess.run(
        [sys.executable, "-m", "edgellm.tune", json.dumps(spec)], capture_output=True, text=True, check=False
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def write_data(path: Path, count: int = 12) -> Path:
    """The same answer to every question."""
    examples = [
        {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": "the world is true"}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def test_from_a_file_to_an_adapter(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model.gguf")
    data, adapter = write_data(tmp_path / "data.jsonl"), tmp_path / "adapter.gguf"
    facts = {"model": str(model), "data": str(data), "validation": str(data), "output": str(adapter)}
    status, events = run(**facts, epochs=6, row_tokens=128, rows_per_step=1, learning_rate=2e-2, layers=1)
    assert status == 0
    assert events[-1] == {"event": "done", "adapter": str(adapter)}
    assert next(event for event in events if event["event"] == "data")["examples"] == 12
    begun = next(event for event in events if event["event"] == "begun")
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, begun["steps"] + 1))
    losses = [event["loss"] for event in events if event["event"] == "validation"]
    assert len(losses) == 7
    assert losses[-1] < 0.7 * losses[0]
    tokens = [1, 5, 9, 30]
    assert divergence(true_logits(model, tokens), true_logits(model, tokens, adapter))[0] > 1e-3


def test_what_is_wrong_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model.gguf")
    data, adapter = write_data(tmp_path / "data.jsonl"), tmp_path / "adapter.gguf"
    facts = {"model": str(model), "output": str(adapter)}
    spoiled = tmp_path / "spoiled.jsonl"
    spoiled.write_text(data.read_text() + "{no JSON\n")
    for wrong, words in (
        ({"data": str(spoiled)}, "line 13"),
        ({"data": str(data), "targets": ["attn_v", "head"]}, "no matrix is called 'head'"),
        ({"data": str(data), "epochs": 0}, "at least one epoch"),
        ({"data": str(data), "output": str(tmp_path / "model.gguf" / "a.gguf")}, "cannot be written"),
    ):
        status, events = run(**{**facts, "row_tokens": 128, "epochs": 1, **wrong})
        assert status == 1
        assert events[-1]["event"] == "failed"
        assert words in events[-1]["message"]
    assert not adapter.exists()
