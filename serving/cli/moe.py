"""`edgellm moe`: mixture-of-experts models larger than memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

moe_app = typer.Typer(
    name="moe",
    help="Look into mixture-of-experts models, whose experts may be paged from flash.",
    no_args_is_help=True,
    add_completion=False,
)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@moe_app.command("inspect")
def inspect(
    model: Annotated[str, typer.Argument(help="A GGUF path or a pulled model's name.")],
    expert_memory: Annotated[
        list[str] | None, typer.Option("--expert-memory", help="A budget to look at (4GiB); may be repeated.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Show a model's experts, the least memory they can be served with, and what a budget is good for.

    The hit rate is what the experts that were needed most so far would give; it is known once the model was served.
    """
    from serving.cli.moe_report import run_inspect

    run_inspect(model, expert_memory or [], as_json=as_json)


@moe_app.command("predict")
def predict(
    source: Annotated[str, typer.Argument(help="A GGUF path, a pulled model's name, or a trace (.csv, .csv.gz).")],
    text: Annotated[Path | None, typer.Argument(help="For a model: the text to read, plain or .gz.")] = None,
    tokens: Annotated[int, typer.Option(min=16, max=65_536, help="Tokens of the text to read.")] = 512,
    expert_memory: Annotated[str, typer.Option("--expert-memory", help="Memory for experts while reading.")] = "2GiB",
    trace: Annotated[Path | None, typer.Option("--trace", help="Write the routes here (.csv or .csv.gz).")] = None,
    as_json: _Json = False,
) -> None:
    """Score the ways of foreseeing experts against what the routers chose: recall in each layer and overall.

    Look-ahead applies the next layers' routers to this layer's router input. The controls must read 100 %: the layer's
    own router on its own input, and the choice itself.
    """
    from serving.cli.moe_report import run_predict

    run_predict(source, text, tokens, expert_memory, trace, as_json=as_json)


@moe_app.command("stats")
def stats(
    url: Annotated[str, typer.Option("--url", help="Where the server is.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option("--api-key", help="Its API key.", envvar="EDGELLM_API_KEY")] = None,
    as_json: _Json = False,
) -> None:
    """Show how the paged models of a running server fare: hits, misses, what was read ahead, and the time lost."""
    from serving.cli.moe_report import run_stats

    run_stats(url, api_key, as_json=as_json)
