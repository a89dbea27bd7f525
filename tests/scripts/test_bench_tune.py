"""The benchmark of tuning: what it makes of runs, and that its rivals get what ours gets."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from bench import tune_data, tune_report
from bench.client import BenchError
from bench.tune_runs import Point, Run, watch

from edgellm.models.bundled import bundled_path


def run_of(*points: tuple[float, float], start_s: float = 0.0, peak: int = 1) -> Run:
    looks = [Point(seconds, step, loss, 0.5) for step, (seconds, loss) in enumerate(points)]
    return Run(start_s=start_s, train_s=points[-1][0], step_s=[1.0] * len(points), points=looks, peak_rss_bytes=peak)


@pytest.mark.parametrize(
    ("loss", "seconds"), [(1.5, 0.0), (1.0, 0.0), (0.9, 5.0), (0.8, 10.0), (0.7, 25.0), (0.6, 40.0), (0.5, None)]
)
def test_time_to_a_loss_lies_on_the_line_between_looks(loss: float, seconds: float | None) -> None:
    # It rises for a while in between: the first time that the loss is reached counts.
    run = run_of((0.0, 1.0), (10.0, 0.8), (20.0, 0.8), (30.0, 0.6 + 1 / 15), (40.0, 0.6))
    found = tune_report.seconds_to(run, loss)
    if loss == 0.7:
        assert found == pytest.approx(20 + 10 * 0.1 / (0.2 - 1 / 15))
    else:
        assert found == (None if seconds is None else pytest.approx(seconds))


def test_goals_are_ratios_to_the_loss_that_a_ends_at() -> None:
    runs = {
        "ours": run_of((0.0, 1.0), (10.0, 0.5), start_s=15.0, peak=2),
        "a": run_of((0.0, 1.0), (100.0, 0.5), start_s=0.0, peak=8),
        "b": run_of((0.0, 1.0), (40.0, 0.6), start_s=0.0),
    }
    ours = tune_report.goals(runs)["ours"]
    assert (ours["of_a"], ours["with_start_of_a"], ours["peak_of_a"]) == (0.1, 0.25, 0.25)
    assert ours["of_b"] is None, "b never got there"
    assert tune_report.goals(runs)["b"]["last_loss_of_a"] == pytest.approx(1.2)
    table = tune_report.targets(runs)
    assert table is not None
    assert [line.split("|")[-2].strip() for line in table.splitlines()[2:]] == ["yes", "NO", "yes", "yes"]


def test_tokens_of_rivals_are_those_of_the_trainer(tmp_path: Path) -> None:
    model = bundled_path()
    assert model is not None
    source = tmp_path / "rows.jsonl.gz"
    rows = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in range(14)]
    source.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    found = tune_data.make_rows(source, model, tmp_path / "data", (10, 2), 512)
    arrays = np.load(found.tokens)
    for name, path in (("training", found.training), ("validation", found.validation)):
        sequences = tune_data.encode(model, path, 512)
        parts = zip(
            np.split(arrays[f"{name}_tokens"], np.cumsum(arrays[f"{name}_lengths"])[:-1]),
            np.split(arrays[f"{name}_mask"], np.cumsum(arrays[f"{name}_lengths"])[:-1]),
            strict=True,
        )
        for sequence, (tokens, mask) in zip(sequences, parts, strict=True):
            assert tokens.tolist() == sequence.tokens.tolist()
            assert mask.tolist() == sequence.mask.tolist()
    assert found.validation.read_text().count("What is 12 + 12?") == 1, "the last rows are the validation's"
    with pytest.raises(BenchError, match="too few"):
        tune_data.make_rows(source, model, tmp_path / "more", (13, 2), 512)


_SAYS = """
import json, sys, tempfile
file = tempfile.TemporaryFile(); file.write(bytes(1 << 20)); file.flush()
print("{'loss': 1.0}"); print("[1]"); print(json.dumps({"loss": 1}))
for event in json.loads(sys.argv[1]):
    print(json.dumps(event), flush=True)
"""


def said(tmp_path: Path, events: list[dict[str, object]], end: str = "") -> Run:
    return watch([sys.executable, "-c", _SAYS + end, json.dumps(events)], tmp_path / "log", os.environ)


def test_a_watched_process_is_believed_in_its_events_alone(tmp_path: Path) -> None:
    look = {"event": "validation", "accuracy": 0.5}
    events = [
        {"event": "plan", "parameters": 7, "sparsity": "top-2"},
        {"event": "begun"},
        {**look, "step": 0, "loss": 2.0},
        {"event": "step", "seconds": 1.5},
        {"event": "step", "seconds": 2.0},
        {**look, "step": 2, "loss": 1.0},
    ]
    run = said(tmp_path, events)
    assert [(point.seconds, point.step, point.loss) for point in run.points] == [(0.0, 0, 2.0), (3.5, 2, 1.0)]
    assert (run.parameters, run.plan["sparsity"], run.step_s) == (7, "top-2", [1.5, 2.0])


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no memory here"):
        said(tmp_path, [{"event": "failed", "message": "no memory here"}], "sys.exit(1)")
    with pytest.raises(BenchError, match="ZeroDivisionError"):
        said(tmp_path, [], "1 / 0")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_and_unnamed_files_of_a_process_are_seen(tmp_path: Path) -> None:
    # It waits for its parent to have looked: the kernel begins its peak anew, which the child can see.
    wait = """
much = bytearray(b"x" * (64 << 20))
print(json.dumps({"event": "step", "seconds": 1.0}), flush=True)
del much
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"event": "begun"}), flush=True)
for _ in range(100_000):
    if peak() < 60 << 10:
        break
print(json.dumps({"event": "step", "seconds": 1.0}), flush=True)
"""
    run = said(tmp_path, [], wait)
    assert run.peak_rss_bytes > 64 << 20
    assert 0 < run.training_peak_rss_bytes < 60 << 20, "the loading is not the training's"
    assert run.disk_bytes >= 1 << 20
