"""How `edgellm tune` shows a run and a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.cli.tune_table import bar
from serving.cli.tune_view import LiveView, Pace, duration
from tests.cli.recorded import DATA, PLAN, USUAL, begun, sound, step, tune, works


def test_plain_lines_where_there_is_no_terminal(recorded, model, data) -> None:
    lines = sound(tune("--model", model, "--data", data)).splitlines()
    assert lines[:3] == [
        "12 examples, 500 tokens, 60 in answers",
        "line 7: cut from 600 to 512 tokens",
        "trains 14 matrices in layers 1-2 (12,345 parameters, rank 8) for 3 epochs of 4 examples a step, "
        "learning rate 0.0005, in about 100 MiB",
    ]
    assert "step 2: validation loss 2.5000, 25.0% right" in lines
    assert "step 3/4, epoch 1.50: loss 2.000, validation 2.500, 200 tokens/s, 90 MiB, 0 s left" in lines
    assert "\x1b" not in "".join(lines)


def test_json_prints_the_events_as_they_come(recorded, model, data) -> None:
    events = [json.loads(line) for line in sound(tune("--model", model, "--data", data, "--json")).splitlines()]
    assert events[:-1] == USUAL
    done = events[-1]
    assert (done["event"], done["trained_tokens"], done["name"]) == ("done", 120, "base-model-my-rows")
    assert [Path(done[name]).suffix for name in ("adapter", "metrics", "picture")] == [".gguf", ".csv", ".svg"]
    assert all(Path(done[name]).is_file() for name in ("adapter", "metrics", "picture"))
    assert done["serve"].endswith("--adapter base-model-my-rows")


def contribution(layer: int, tensor: str, gain: float) -> dict[str, Any]:
    return {"event": "contribution", "layer": layer, "tensor": tensor, "gain": gain}


def scheme(text: str, layers: list[int], share: float, chosen: bool) -> dict[str, Any]:
    facts = {"text": text, "layers": layers, "sites": 4, "parameters": 5_000, "share": share, "chosen": chosen}
    return {"event": "scheme", **facts, "memory_bytes": 50 << 20, "seconds": 125.0, "recompute": False}


ANALYSIS = [
    DATA,
    contribution(0, "attn_q", -0.1),
    contribution(1, "attn_v", 1.0),
    contribution(2, "ffn_up", 1.5),
    contribution(2, "attn_v", 1.5),
    scheme("top-2", [1, 2], 1.0, False),
    scheme("2-2:attn_v", [2, 2], 0.375, True),
    scheme("1:attn_v+2:attn_q,attn_k,attn_v,attn_output", [1, 2], 0.5, False),
    PLAN,
]


def test_the_plan_as_tables(recorded, model, data) -> None:
    done = {"event": "done", "adapter": None, "metrics": None, "trained_tokens": 0, "steps": 0}
    recorded.script[:] = [*ANALYSIS, lambda trainer: trainer.on_event(done)]
    lines = sound(tune("plan", "--model", model, "--data", data, "--memory", "1GiB")).splitlines()
    rows = [line.split() for line in lines]
    assert ["2", "█" * 24, "75.0%", "ffn_up", "37.5%,", "attn_v", "37.5%"] in rows
    assert ["1", "█" * 8, "25.0%", "attn_v", "25.0%"] in rows
    assert ["0", "0.0%"] in rows
    assert ["top-2", "1-2", "4", "5,000", "50", "MiB", "2", "min", "5", "s", "100%"] in rows
    assert ["→", "2-2:attn_v", "2-2", "4", "5,000", "50", "MiB", "2", "min", "5", "s", "38%"] in rows
    assert ["1:attn_v+2:attn_q,attn_k,at…", "1-2"] in [row[:2] for row in rows]
    assert lines[-1] == "the same without analysis: edgellm tune --sparsity top-2 ..."
    spec = recorded.made[-1].spec
    assert (spec["only_plan"], spec["state"], spec["memory_budget_bytes"]) == (True, None, 1 << 30)
    assert works() == []
    told = sound(tune("plan", "--model", model, "--data", data, "--json")).splitlines()
    assert [json.loads(line) for line in told] == [*ANALYSIS, done]


def test_bars() -> None:
    assert [bar(share) for share in (0, 1 / 192, 0.5, 1)] == ["", "▏", "█" * 12, "█" * 24]


def test_the_pace() -> None:
    pace = Pace()
    assert (pace.loss, pace.tokens_per_s, pace.left_s) == (None, None, None)
    for event in (begun(100, 10), step(11, 3.0, seconds=2.0), step(12, 1.0, seconds=1.0, all_tokens=500)):
        pace.take(event)
    assert pace.loss == pytest.approx((0.9 * 3 + 1) / 1.9)
    assert pace.tokens_per_s == pytest.approx(200)
    assert pace.left_s == pytest.approx(88 * 1.5)
    assert [duration(s) for s in (0.4, 59, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]


def test_a_bar_in_a_terminal() -> None:
    from rich.console import Console

    console = Console(force_terminal=True, width=80, record=True)
    with LiveView(console) as view:
        for event in USUAL:
            view.show(event)
        figures = list(view._bar.get_renderables())[1]
        assert str(figures) == "  loss 2.000  validation 2.500  200 tokens/s  90 MiB  0 s left"
        (task,) = view._bar.tasks
        assert (task.completed, task.total, task.description) == (4, 4, "epoch 2.00")
    assert "step 2: validation loss 2.5000" in console.export_text()
