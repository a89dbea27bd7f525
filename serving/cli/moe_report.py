"""What `edgellm moe` tells. Imported when one of its commands runs: `--help` must be quick."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from prometheus_client.samples import Sample
from rich.console import Console
from rich.table import Table

from edgellm.config import home_dir, parse_bytes
from edgellm.engine.threads import default_threads
from edgellm.errors import ConfigError, ModelTooLargeError, ModelUnsupportedError
from edgellm.models.describe import describe
from edgellm.models.store import ModelStore
from edgellm.moe.layout import ExpertLayout, plan_experts, read_layout
from edgellm.moe.pair_table import PairTable
from edgellm.moe.predictors import HotList, PreviousToken, Recall, Told, score
from edgellm.moe.profile import Profile, expected_hit_rate, read_profile
from edgellm.moe.recorder import Recording, record_routes
from edgellm.moe.routes import read_trace, write_trace
from edgellm.moe.skeleton import profile_path
from serving.cli.metrics_page import read_metrics
from serving.cli.text_files import read_text

_SHARES = (0.1, 0.25, 0.5, 0.75)
_MIB = 1 << 20


def run_inspect(model: str, budgets: list[str], *, as_json: bool) -> None:
    """Prints a model's experts and what `budgets`, sizes as users write them, are good for."""
    found = ModelStore().find(model)
    layout = read_layout(found.path)
    if layout is None:
        raise ModelUnsupportedError(f"{found.path.name} has no experts")
    profile = read_profile(profile_path(layout.headers, home_dir()), layout)
    facts = _facts(found.path.name, layout, profile, [_size(text) for text in budgets])
    info = describe(found.path)
    facts["dense_bytes"] = info.tensor_bytes - info.expert_bytes
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console()
    for name, text in _lines(facts):
        console.print(f"[bold]{name:18}[/bold] {text}", highlight=False)
    table = Table("expert memory", "experts that stay", "expected hit rate", box=None, header_style="bold")
    for row in facts["budgets"]:
        rate = row["expected_hit_rate"]
        table.add_row(
            _mib(row["bytes"]),
            f"{row['slots']} of {facts['experts_total']}",
            "unknown" if rate is None else f"{rate:.1%}",
        )
    console.print(table)


def _size(text: str) -> int:
    try:
        return int(parse_bytes(text))
    except ValueError as error:
        raise ConfigError(f"--expert-memory: {error}") from None


def _facts(name: str, layout: ExpertLayout, profile: Profile, budgets: list[int]) -> dict[str, Any]:
    sizes = budgets or [
        layout.least_bytes,
        *(max(layout.least_bytes, int(layout.whole_bytes * share)) for share in _SHARES),
        layout.whole_bytes,
    ]
    return {
        "model": name,
        "layers": layout.layers,
        "experts": layout.experts,
        "experts_used": layout.experts_used,
        "experts_total": layout.layers * layout.experts,
        "expert_bytes": sorted(set(layout.read_bytes)),
        "all_experts_bytes": layout.all_read_bytes,
        "token_bytes": layout.experts_used * sum(layout.read_bytes),
        "least_budget_bytes": layout.least_bytes,
        "whole_budget_bytes": layout.whole_bytes,
        "profile_needs": int(profile.sum()),
        "budgets": [_budget(layout, profile, size) for size in sizes],
    }


def _budget(layout: ExpertLayout, profile: Profile, size: int) -> dict[str, Any]:
    try:
        plan = plan_experts(layout, size)
    except ModelTooLargeError as error:
        raise ConfigError(f"--expert-memory: {error}") from None
    return {
        "bytes": size,
        "slots": sum(plan.slots),
        "expected_hit_rate": expected_hit_rate(profile, layout, plan.slots),
    }


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    each = [_mib(size) for size in facts["expert_bytes"]]
    if len(each) > 2:  # a pack's, in the middle of each layer
        each = [f"{each[0]} to {each[-1]}"]
    return [
        ("model", facts["model"]),
        ("MoE layers", str(facts["layers"])),
        ("experts", f"{facts['experts']} in a layer, {facts['experts_used'] or 'an unknown number'} for each token"),
        ("one expert", " or ".join(each)),
        ("all experts", f"{_mib(facts['all_experts_bytes'])}; a token uses {_mib(facts['token_bytes'])}"),
        ("the rest", _mib(facts["dense_bytes"])),
        ("least budget", _mib(facts["least_budget_bytes"])),
        ("all stay with", _mib(facts["whole_budget_bytes"])),
        (
            "routing profile",
            f"{facts['profile_needs']:,} needs" if facts["profile_needs"] else "none yet: serve it first",
        ),
    ]


def _mib(size: int) -> str:
    if size < _MIB:
        return f"{size / 1024:,.0f} KiB"
    return f"{size / _MIB:,.1f} MiB" if size < 100 * _MIB else f"{size / _MIB:,.0f} MiB"


def run_predict(
    source: str, text: Path | None, tokens: int, expert_memory: str, trace: Path | None, *, as_json: bool
) -> None:
    """Prints how well each predictor foresees the routes of a model over a text, or of a trace."""
    found: dict[str, Recall] = {}
    if source.endswith((".csv", ".csv.gz")):
        routes = read_trace(Path(source).expanduser())
    else:
        recording = _recorded(source, text, tokens, _size(expert_memory))
        routes = recording.trace
        names = {0: "control: the layer's own router", 1: "look-ahead, one layer", 2: "look-ahead, two layers"}
        found |= {names[distance]: recall for distance, recall in recording.foreseen.items()}
        if trace is not None:
            write_trace(trace, routes)
    layers, experts = routes.shape.layers, routes.shape.experts
    found["EdgeMoE's table"] = score(routes, PairTable(layers, experts))
    found["previous token"] = score(routes, PreviousToken(layers))
    found["hot list"] = score(routes, HotList(layers, experts))
    found["control: the choice"] = score(routes, Told())
    if as_json:
        typer.echo(json.dumps({name: _recall_facts(recall) for name, recall in found.items()}, indent=2))
        return
    table = Table("predictor", "recall", "least", "layer by layer", box=None, header_style="bold")
    for name, recall in found.items():
        each = " ".join("-" if math.isnan(value) else f"{100 * value:.0f}" for value in recall.layers)
        least = min(value for value in recall.layers if not math.isnan(value))
        table.add_row(name, f"{recall.overall:.1%}", f"{least:.1%}", each)
    Console().print(table)


def _recall_facts(recall: Recall) -> dict[str, Any]:
    return {"recall": recall.overall, "layers": [None if math.isnan(value) else value for value in recall.layers]}


def _recorded(source: str, text: Path | None, tokens: int, budget: int) -> Recording:
    if text is None:
        raise ConfigError("a model needs a text to read")
    found = ModelStore().find(source)
    layout = read_layout(found.path)
    if layout is None:
        raise ModelUnsupportedError(f"{found.path.name} has no experts")
    return record_routes(
        layout,
        read_text(text)[: tokens * 64],
        tokens,
        home_dir(),
        budget_bytes=max(layout.least_bytes, budget),
        threads=default_threads(),
        architecture=describe(found.path).architecture,
    )


def run_stats(url: str, api_key: str | None, *, as_json: bool) -> None:
    """Prints the figures of the paged models of the server at `url`."""
    models = _paged_models(read_metrics(url, api_key))
    if as_json:
        typer.echo(json.dumps(models, indent=2))
        return
    if not models:
        typer.echo("no model with paged experts is loaded")
    for name, figures in models.items():
        table = Table(title=name, box=None, show_header=False, title_style="bold", title_justify="left")
        for line in _figure_lines(figures):
            table.add_row(*line)
        Console().print(table)


def _paged_models(samples: Iterable[Sample]) -> dict[str, dict[str, float]]:
    """model -> figure -> value, of the figures about experts."""
    models: dict[str, dict[str, float]] = {}
    for sample in samples:
        if sample.name.startswith("expert"):
            kind = f"_{sample.labels['predictor']}" if "predictor" in sample.labels else ""
            models.setdefault(sample.labels["model"], {})[sample.name + kind] = sample.value
    return models


def _figure_lines(figures: dict[str, float]) -> list[tuple[str, str]]:
    def value(name: str) -> float:
        return figures.get(f"expert_{name}", 0.0)

    needed = value("needed") or 1.0
    ahead = value("prefetched") or 1.0
    by = next((f", by the {name}" for name in ("routers", "table") if value(f"predictor_{name}")), "")
    return [
        ("in memory", f"room for {value('slots'):.0f} of {figures.get('experts', 0):.0f} experts"),
        ("memory", _mib(int(value("memory_bytes")))),
        ("needed", f"{value('needed'):,.0f}"),
        ("hits", f"{value('hits'):,.0f} ({value('hits') / needed:.1%})"),
        ("misses", f"{value('loads'):,.0f} kept, {value('streamed'):,.0f} streamed"),
        ("read ahead", f"{value('prefetched'):,.0f}, now {'on' if value('prefetch') else 'off'}{by}"),
        ("  useful", f"{value('prefetch_used'):,.0f} ({value('prefetch_used') / ahead:.1%})"),
        ("  wasted", f"{value('prefetch_wasted'):,.0f}"),
        ("read", f"{_mib(int(value('read_bytes')))} in {value('reads'):,.0f} reads"),
        ("stalled", f"{value('stall_seconds'):,.1f} s"),
    ]
