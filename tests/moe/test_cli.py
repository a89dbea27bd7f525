"""`edgellm moe`, by its typer application, real files and a real server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from typer.testing import CliRunner

from edgellm.backend.experts import ExpertStats
from edgellm.config import home_dir
from edgellm.errors import (
    ConfigError,
    EdgeLLMError,
    InvalidTraceError,
    ModelNotFoundError,
    ModelUnsupportedError,
    PackError,
)
from edgellm.moe.layout import read_layout
from edgellm.moe.pager import PagerSnapshot
from edgellm.moe.profile import read_profile, write_profile
from edgellm.moe.routes import read_trace
from edgellm.moe.skeleton import profile_path
from serving.cli.moe import moe_app
from serving.metrics import Metrics, ModelSnapshot
from tests.serving.live import serve
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_moe import write_tiny_moe

STATS = ExpertStats(
    visits=10, needed=40, hits=30, loads=7, streamed=1, prefetched=5, prefetch_used=2, prefetch_wasted=1,
    reads=39, bytes=1 << 21, stall_ns=1_500_000_000, read_ns=2_000_000_000,
)  # fmt: skip


def run(*arguments: str) -> str:
    result = CliRunner().invoke(moe_app, list(arguments), env={"COLUMNS": "160"})
    if isinstance(result.exception, EdgeLLMError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_inspect(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "moe.gguf", "qwen3moe")
    layout = read_layout(path)
    assert layout is not None
    shown = run("inspect", str(path))
    for part in ("3", "8 in a layer, 2 for each token", "none yet", "24 of 24", "unknown"):
        assert part in shown
    profile = profile_path(layout.headers, home_dir())
    profile.parent.mkdir(parents=True)
    counts = read_profile(profile, layout)
    counts[:, 0] = 3
    counts[:, 5] = 1
    write_profile(profile, counts)
    facts = json.loads(run("inspect", str(path), "--json", "--expert-memory", str(layout.whole_bytes)))
    assert facts["least_budget_bytes"] == layout.least_bytes
    assert facts["budgets"] == [{"bytes": layout.whole_bytes, "slots": 24, "expected_hit_rate": 1.0}]
    rates = [row["expected_hit_rate"] for row in json.loads(run("inspect", str(path), "--json"))["budgets"]]
    assert rates == sorted(rates)
    assert rates[0] == 0.0


def test_inspect_what_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupportedError, match="has no experts"):
        run("inspect", str(write_tiny_llama(tmp_path / "dense.gguf")))
    with pytest.raises(ModelNotFoundError):
        run("inspect", str(tmp_path / "nothing.gguf"))
    path = str(write_tiny_moe(tmp_path / "moe.gguf", "qwen3moe"))
    with pytest.raises(ConfigError, match="not a size"):
        run("inspect", path, "--expert-memory", "much")
    with pytest.raises(ConfigError, match="at least"):
        run("inspect", path, "--expert-memory", "1k")


def _app(paged: bool) -> FastAPI:
    pager = PagerSnapshot(slots=12, experts=24, resident_bytes=3 << 20, ahead=True, stats=STATS, predictor="table")
    state = ModelSnapshot("tiny", 0, 0, 0, 1, 0, 0, 0, 0.0, 0.0, experts=pager if paged else None)
    app = FastAPI()

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(Metrics(lambda: [state]).render()[0])

    return app


def test_stats() -> None:
    with serve(_app(paged=True)) as port:
        url = f"http://127.0.0.1:{port}"
        shown = run("stats", "--url", url)
        figures = json.loads(run("stats", "--url", url, "--json"))["tiny"]
    for part in (
        "tiny",
        "12 of 24 experts",
        "30 (75.0%)",
        "7 kept, 1 streamed",
        "5, now on, by the table",
        "2 (40.0%)",
        "2.0 MiB in 39",
        "1.5 s",
    ):
        assert part in shown
    assert figures["expert_needed"] == 40
    assert figures["expert_stall_seconds"] == 1.5
    assert figures["experts"] == 24
    assert figures["expert_predictor_table"] == 1


def test_stats_of_nothing() -> None:
    with serve(_app(paged=False)) as port:
        assert "no model with paged experts" in run("stats", "--url", f"http://127.0.0.1:{port}")
        with pytest.raises(ConfigError, match="status 404"):
            run("stats", "--url", f"http://127.0.0.1:{port}/elsewhere")
    with pytest.raises(ConfigError, match="no server answers"):
        run("stats", "--url", f"http://127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="no server answers"):
        run("stats", "--url", "nonsense")


def test_predict_a_model(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "moe.gguf", "qwen3moe")
    text = tmp_path / "text.txt"
    text.write_text("the name of the world is true and you is the user of it " * 8)
    trace = tmp_path / "routes.csv.gz"
    found = json.loads(run("predict", str(path), str(text), "--tokens", "100", "--trace", str(trace), "--json"))
    for name in ("control: the layer's own router", "control: the choice"):
        assert found[name] == {"recall": 1.0, "layers": [1.0, 1.0, 1.0]}
    ahead = found["look-ahead, one layer"]["layers"]
    assert ahead[0] is None
    assert all(0.25 < value < 1 for value in ahead[1:])  # by chance 2 of 8
    assert found["previous token"]["recall"] < 1
    routes = read_trace(trace)
    assert len(routes.steps) == 100
    assert (routes.shape.layers, routes.shape.experts, routes.shape.top_k) == (3, 8, 2)
    again = json.loads(run("predict", str(trace), "--json"))
    assert again == {name: recall for name, recall in found.items() if name in again}
    assert "look-ahead, one layer" in run("predict", str(path), str(text), "--tokens", "20")


def test_predict_what_it_cannot(tmp_path: Path) -> None:
    path = str(write_tiny_moe(tmp_path / "moe.gguf", "qwen3moe"))
    with pytest.raises(ConfigError, match="needs a text"):
        run("predict", path)
    with pytest.raises(ConfigError, match="cannot be read"):
        run("predict", path, str(tmp_path / "nothing.txt"))
    bad = tmp_path / "bad.csv"
    bad.write_text("no trace")
    with pytest.raises(InvalidTraceError):
        run("predict", str(bad))


def test_pack(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "moe.gguf", "qwen3moe", weights="q8_0", context=1024)
    assert "packed" in run("pack", str(path))
    assert (tmp_path / "moe.pack.gguf").is_file()
    with pytest.raises(PackError, match="is there already"):
        run("pack", str(path))
    text = tmp_path / "text.txt"
    text.write_text("what is chosen is measured, and what is measured is chosen. " * 40)
    narrow = tmp_path / "narrow.gguf"
    options = ["--loss-target", "5%", "--text", str(text), "--tokens", "512", "--measurements", "16", "-o", str(narrow)]
    facts = json.loads(run("pack", str(path), *options, "--json"))
    assert facts["pack_perplexity"] <= 1.05 * facts["perplexity"]
    assert facts["pack_bytes"] == narrow.stat().st_size
    assert facts["pack_expert_bytes"] < facts["expert_bytes"]
    assert 0 < facts["pack_token_bytes"] < facts["token_bytes"]
    assert sum(facts["experts_by_bits"].values()) == 24
    assert facts["held_out"]["tokens"] == 256
    shown = run("inspect", str(narrow))
    assert "8 in a layer, 2 for each token" in shown
    assert re.search(r"one expert +\d+ KiB", shown)


@pytest.mark.parametrize("loss", ["two", "-1%", "200%", "nan", ""])
def test_losses_that_are_none(tmp_path: Path, loss: str) -> None:
    path = write_tiny_moe(tmp_path / "moe.gguf", "qwen3moe")
    with pytest.raises(ConfigError, match="--loss-target"):
        run("pack", str(path), "--loss-target", loss)
    with pytest.raises(ConfigError, match="cannot be read"):
        run("pack", str(path), "--loss-target", "2%", "--text", str(tmp_path / "nothing.txt"))
    assert [file.name for file in tmp_path.glob("*.gguf")] == ["moe.gguf"]
