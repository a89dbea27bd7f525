"""`edgellm moe`: mixture-of-experts models larger than memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgellm.errors import ConfigError

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


@moe_app.command("pack")
def pack(
    model: Annotated[str, typer.Argument(help="A GGUF path or a pulled model's name.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: NAME.pack.gguf beside it.")] = None,
    loss_target: Annotated[
        str | None,
        typer.Option("--loss-target", help="Store experts with fewer bits, for at most so much perplexity more (2%)."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Measure on this text, plain or .gz. Default: Python's reference.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=512, max=65_536, help="Tokens of it to read each time.")] = 2048,
    measurements: Annotated[int, typer.Option(min=16, max=10_000, help="Most times to read it.")] = 100,
    expert_memory: Annotated[
        str | None, typer.Option("--expert-memory", help="Memory for experts while measuring (4GiB).")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Write an expert pack: a copy of the model in which all of an expert lies together, so that one read brings it.

    It is served like the model: `edgellm serve --model NAME.pack.gguf`. Without --loss-target it computes exactly what
    the model does. With it, experts are stored with 2 to 6 bits a weight where that costs least, as measured.
    """
    from edgellm.config import parse_bytes
    from serving.cli.moe_pack import PackRequest, parse_loss, run_pack

    loss = None if loss_target is None else parse_loss(loss_target)
    try:
        memory = None if expert_memory is None else int(parse_bytes(expert_memory))
    except ValueError as error:
        raise ConfigError(f"--expert-memory: {error}") from None
    run_pack(PackRequest(model, output, loss, text, tokens, measurements, memory), as_json=as_json)


@moe_app.command("stats")
def stats(
    url: Annotated[str, typer.Option("--url", help="Where the server is.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option("--api-key", help="Its API key.", envvar="EDGELLM_API_KEY")] = None,
    as_json: _Json = False,
) -> None:
    """Show how the paged models of a running server fare: hits, misses, what was read ahead, and the time lost."""
    from serving.cli.moe_report import run_stats

    run_stats(url, api_key, as_json=as_json)
