"""`edgellm models`: list, pull, show and remove the models on this machine."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from edgellm.config import Settings, load_settings
from edgellm.errors import EdgeLLMError, ModelUnsupportedError
from edgellm.models.describe import ModelInfo, describe
from edgellm.models.hub import PullProgress, pull
from edgellm.models.memory import available_memory_bytes
from edgellm.models.store import ModelStore, StoredModel

models_app = typer.Typer(
    name="models",
    help="List, pull, show and remove the models on this machine.",
    no_args_is_help=True,
    add_completion=False,
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_Name = Annotated[str, typer.Argument(help="A name from `edgellm models list`, or a path to a GGUF file.")]


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Deliberate errors end the command with one line on stderr and exit code 1."""
    try:
        yield
    except EdgeLLMError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; what has arrived is kept for the next pull", err=True)
        raise typer.Exit(130) from None


@models_app.command("list")
def list_models(as_json: _Json = False) -> None:
    """List the models that can be served: the bundled one, those pulled, and files put into the models directory."""
    with _one_line_errors():
        models = ModelStore().list()
    if as_json:
        _print_json([_stored_facts(model) for model in models])
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("NAME", overflow="fold")
    table.add_column("SIZE", justify="right", no_wrap=True)
    table.add_column("CREATED", no_wrap=True)
    table.add_column("SOURCE", overflow="fold")
    for model in models:
        table.add_row(model.name, _size(model.bytes), _date(model.created), model.source)
    Console().print(table)


@models_app.command("pull")
def pull_model(
    spec: Annotated[
        str,
        typer.Argument(
            help="owner/repo, owner/repo:Q4_K_M, owner/repo/file.gguf, each with @revision, or an address on hf.co. "
            "Without a quantisation: Q4_K_M, else Q4_0, else the next usual one."
        ),
    ],
    endpoint: Annotated[
        str | None, typer.Option(help="Where to pull from. Default: HF_ENDPOINT, else https://huggingface.co.")
    ] = None,
) -> None:
    """Pull a GGUF model from the Hugging Face Hub.

    A pull that was cut off goes on where it stopped when it is started again. Size, hash and file header are checked
    before the model can be used. Private and gated models need HF_TOKEN.
    """
    with _one_line_errors(), _progress_bar() as report:
        model = pull(spec, ModelStore(), endpoint=endpoint, progress=report)
    typer.echo(f"{model.name} ({_size(model.bytes)}) is ready: edgellm serve --model {model.name}")


@models_app.command("show")
def show_model(name: _Name, as_json: _Json = False) -> None:
    """Show what a model is: architecture, size, quantisation, context, and the memory it will need."""
    with _one_line_errors():
        model = ModelStore().find(name)
        info = describe(model.path)
        facts = {**_stored_facts(model), **_model_facts(info)}
    if as_json:
        _print_json(facts)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _lines(facts):
        table.add_row(label, text)
    Console().print(table)


@models_app.command("rm")
def remove_model(
    name: Annotated[str, typer.Argument(help="The full name from `edgellm models list`.")],
) -> None:
    """Remove a model's files from this machine."""
    with _one_line_errors():
        model = ModelStore().remove(name)
    typer.echo(f"removed {model.name} ({_size(model.bytes)})")


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[PullProgress], None]]:
    """A bar with rate and time left on stderr; nothing where stderr is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bars:
        task: TaskID | None = None

        def report(now: PullProgress) -> None:
            nonlocal task
            if task is None:  # what had arrived earlier does not count towards the rate
                task = bars.add_task(now.name.rsplit("/", 1)[-1], total=now.total_bytes, completed=now.done_bytes)
            else:
                bars.update(task, completed=now.done_bytes)

        yield report


def _stored_facts(model: StoredModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "path": str(model.path),
        "bytes": model.bytes,
        "source": model.source,
        "created": model.created,
    }


def _model_facts(info: ModelInfo) -> dict[str, Any]:
    from edgellm.engine.fit import context_tokens_for

    settings = load_settings()  # `edgellm serve` without arguments
    return {
        "title": info.name,
        "architecture": info.architecture,
        "parameters": info.parameters,
        "quantisation": info.quantisation,
        "context_tokens": info.context_tokens,
        "layers": info.layers,
        "embedding_width": info.embedding_width,
        "heads": info.heads,
        "kv_heads": max(info.kv_heads, default=0),
        "experts": info.experts,
        "experts_used": info.experts_used,
        "vocabulary": info.vocabulary,
        "tokenizer": info.tokenizer,
        "chat_template": info.chat_template is not None,
        "named_templates": sorted(info.named_templates),
        "pooling": info.pooling,
        "recurrent": info.recurrent,
        "adapter": None if info.adapter is None else {"rank": info.adapter.rank, "alpha": info.adapter.alpha},
        "licence": info.licence,
        "memory_context_tokens": context_tokens_for(info, settings),
        "memory_bytes": _memory_bytes(info, settings),
        "memory_available_bytes": available_memory_bytes(),
    }


def _memory_bytes(info: ModelInfo, settings: Settings) -> int:
    from edgellm.engine.fit import plan_load, whole_memory

    try:
        return plan_load(info, settings).memory.total_bytes
    except ModelUnsupportedError:  # it can neither be paged nor mapped here
        return whole_memory(info, settings).total_bytes


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts worth a line, for people."""
    yield "name", facts["name"]
    yield "title", facts["title"]
    yield "file", f"{facts['path']} ({_size(facts['bytes'])}, from {facts['source']})"
    yield "architecture", facts["architecture"] + (", recurrent" if facts["recurrent"] else "")
    yield "parameters", _count(facts["parameters"])
    yield "quantisation", facts["quantisation"]
    if facts["adapter"]:
        yield "LoRA adapter", f"rank {facts['adapter']['rank']}, alpha {facts['adapter']['alpha']:g}"
    else:
        yield "context", f"{facts['context_tokens']:,} tokens"
        yield (
            "shape",
            (
                f"{facts['layers']} layers, width {facts['embedding_width']}, "
                f"{facts['heads']} heads, {facts['kv_heads']} for keys and values"
            ),
        )
        if facts["experts"]:
            yield "experts", f"{facts['experts_used']} of {facts['experts']} for each token"
        yield "vocabulary", f"{facts['vocabulary']:,} tokens, {facts['tokenizer']}"
        named = f", and for {', '.join(facts['named_templates'])}" if facts["named_templates"] else ""
        yield "chat template", ("yes" if facts["chat_template"] else "none") + named
        if facts["pooling"]:
            yield "pooling", facts["pooling"]
        yield (
            "memory",
            (
                f"about {_size(facts['memory_bytes'])} with {facts['memory_context_tokens']:,} tokens of context; "
                f"{_size(facts['memory_available_bytes'])} available now"
            ),
        )
    if facts["licence"]:
        yield "licence", facts["licence"]


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _size(n_bytes: float) -> str:
    """Decimal units, as disks and the Hub state them."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    power = min(int(math.log(n_bytes, 1000)), 4)
    return f"{n_bytes / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 10**9 else f"{number / 1e6:.1f} million"


def _date(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).astimezone().strftime("%Y-%m-%d %H:%M")
