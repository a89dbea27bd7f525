"""What `edgellm spec` tells. Imported when one of its commands runs: `--help` must be quick."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import httpx
import typer
from prometheus_client.samples import Sample
from rich.console import Console
from rich.table import Table

from edgellm.config import home_dir
from edgellm.errors import ConfigError
from edgellm.speculative.loading import forget
from serving.cli.metrics_page import read_metrics

_TIMEOUT_S = 60.0
_FIGURES = {
    "draft_guesses": "guesses",
    "draft_accepted_tokens": "accepted",
    "draft_rejected_tokens": "rejected",
    "draft_saved_seconds": "saved_s",
}


def run_stats(url: str, api_key: str | None, *, as_json: bool) -> None:
    """Prints the figures of every model of the server at `url` that generates text."""
    models = drafting_models(read_metrics(url, api_key))
    if as_json:
        typer.echo(json.dumps(models, indent=2))
        return
    if not models:
        typer.echo("no model that generates text is loaded")
    for name, facts in models.items():
        _print(name, facts)


def drafting_models(samples: Iterable[Sample]) -> dict[str, dict[str, Any]]:
    """model -> what /metrics tells about its drafting."""
    models: dict[str, dict[str, Any]] = {}
    for sample in samples:
        facts = models.get(sample.labels["model"], {})
        if sample.name == "drafting":
            facts |= {"drafting": bool(sample.value), "proposers": {}}
            if sample.labels["reason"]:
                facts["reason"] = sample.labels["reason"]
            models[sample.labels["model"]] = facts
        elif sample.name in ("target_calls", "target_tokens"):
            facts[sample.name] = int(sample.value)
        elif sample.name == "drafter_adaptations":
            facts.setdefault("adaptations", {})[sample.labels["result"]] = int(sample.value)
        elif sample.name == "drafter_acceptance":
            facts.setdefault("held_out_acceptance", {})[sample.labels["adapter"]] = sample.value
        elif sample.name in ("drafter_adapting", "drafter_adaptation_cpu_seconds"):
            facts[sample.name] = sample.value
        elif sample.name in _FIGURES:
            proposer = facts["proposers"].setdefault(sample.labels["proposer"], {})
            name = _FIGURES[sample.name]
            proposer[name] = sample.value if name == "saved_s" else int(sample.value)
    return models


def _print(name: str, facts: dict[str, Any]) -> None:
    console = Console()
    if not facts["drafting"]:
        console.print(f"[bold]{name}[/bold]: nothing is drafted: {facts['reason']}", soft_wrap=True)
        return
    calls, tokens = facts["target_calls"], facts["target_tokens"]
    rate = f"{tokens / calls:.2f} tokens a target call ({tokens:,} in {calls:,})" if calls else "no answers yet"
    console.print(f"[bold]{name}[/bold]: {rate}", soft_wrap=True)
    table = Table("proposer", "guesses", "accepted", "rejected", "acceptance", "saved", box=None, header_style="bold")
    for proposer, figures in facts["proposers"].items():
        drafted = figures["accepted"] + figures["rejected"]
        table.add_row(
            proposer,
            f"{figures['guesses']:,}",
            f"{figures['accepted']:,}",
            f"{figures['rejected']:,}",
            f"{figures['accepted'] / drafted:.1%}" if drafted else "-",
            f"{figures['saved_s']:,.1f} s",
        )
    console.print(table)
    if "adaptations" in facts:
        console.print(adaptation_line(facts), soft_wrap=True)


def adaptation_line(facts: dict[str, Any]) -> str:
    """What came of adapting the model's drafter, in words."""
    done = facts["adaptations"]
    now = "is being adapted; " if facts["drafter_adapting"] else ""
    tries = sum(done.values())
    if not tries:
        return f"drafter: {now}not adapted yet"
    line = f"drafter: {now}{tries} adaptation{'' if tries == 1 else 's'}, {done['taken']} taken"
    line += f", {facts['drafter_adaptation_cpu_seconds']:,.0f} s of CPU"
    rates = facts.get("held_out_acceptance", {})
    if len(rates) == 2:
        line += f"; accepted on answers held out: {rates['in use']:.1%}, {rates['none']:.1%} without an adapter"
    return line


def run_forget(url: str, api_key: str | None) -> None:
    """Asks the server at `url`, and deletes what lies on this machine's disk."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.delete(f"{url.rstrip('/')}/v1/drafts", headers=headers, timeout=_TIMEOUT_S)
    except httpx.ConnectError:
        typer.echo(f"no server answers at {url}: only what is on disk is deleted")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"{url}: {error}") from None
    else:
        if answer.status_code != httpx.codes.OK:
            raise ConfigError(f"{url}/v1/drafts answers with status {answer.status_code}")
        typer.echo(f"the server at {url} has forgotten")
    models = forget(home_dir())
    typer.echo(f"on disk: {models} model{'' if models == 1 else 's'} forgotten" if models else "on disk: nothing there")
