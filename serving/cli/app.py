"""The subcommands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgellm import __version__
from edgellm.config import load_settings
from serving.cli.draft import draft_app
from serving.cli.guard import guard_app
from serving.cli.models import models_app
from serving.cli.moe import moe_app
from serving.cli.options import given, setting
from serving.cli.spec import spec_app
from serving.cli.tune import tune_app

app = typer.Typer(
    name="edgellm",
    help="Run quantised small language models on this machine, behind an OpenAI-compatible HTTP API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(draft_app, name="draft")
app.add_typer(guard_app, name="guard")
app.add_typer(models_app, name="models")
app.add_typer(moe_app, name="moe")
app.add_typer(spec_app, name="spec")
app.add_typer(tune_app, name="tune")

_Texts = list[str] | None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgellm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Settings come from the command line, then from EDGELLM_* variables, then from config.toml in the state
    directory (EDGELLM_HOME), then from the defaults shown."""


@app.command()
def serve(
    model: Annotated[_Texts, setting("model", "--model", "-m")] = None,
    host: Annotated[str | None, setting("host")] = None,
    port: Annotated[int | None, setting("port", "--port", "-p")] = None,
    adapter: Annotated[_Texts, setting("adapter")] = None,
    keep_alive: Annotated[str | None, setting("keep_alive_s")] = None,
    memory_budget: Annotated[str | None, setting("memory_budget_bytes")] = None,
    context_tokens: Annotated[int | None, setting("context_tokens", "--context-tokens", "-c")] = None,
    parallel: Annotated[int | None, setting("parallel", "--parallel", "-np")] = None,
    prompt_chunk_tokens: Annotated[int | None, setting("prompt_chunk_tokens")] = None,
    prefix_memory: Annotated[str | None, setting("prefix_memory_bytes")] = None,
    threads: Annotated[int | None, setting("threads", "--threads", "-t")] = None,
    flash_attention: Annotated[str | None, setting("flash_attention")] = None,
    packed_weights: Annotated[str | None, setting("packed_weights")] = None,
    huge_pages: Annotated[str | None, setting("huge_pages")] = None,
    expert_memory: Annotated[str | None, setting("expert_memory_bytes")] = None,
    expert_checksums: Annotated[str | None, setting("expert_checksums")] = None,
    draft: Annotated[str | None, setting("draft")] = None,
    adapt: Annotated[str | None, setting("adapt")] = None,
    adapt_after: Annotated[str | None, setting("adapt_after_s")] = None,
    queue_limit: Annotated[int | None, setting("queue_limit")] = None,
    guard: Annotated[str | None, setting("guard")] = None,
    guard_level: Annotated[str | None, setting("guard_level")] = None,
    guard_on_error: Annotated[str | None, setting("guard_on_error")] = None,
    guard_allow: Annotated[_Texts, setting("guard_allow")] = None,
    guard_block: Annotated[_Texts, setting("guard_block")] = None,
    api_key_file: Annotated[Path | None, setting("api_key_file")] = None,
    allowed_host: Annotated[_Texts, setting("allowed_host")] = None,
    cors_origin: Annotated[_Texts, setting("cors_origin")] = None,
    max_body: Annotated[str | None, setting("max_body_bytes")] = None,
    max_file: Annotated[str | None, setting("max_file_bytes")] = None,
    request_timeout: Annotated[str | None, setting("request_timeout_s")] = None,
    grace_seconds: Annotated[str | None, setting("grace_seconds")] = None,
    log_level: Annotated[str | None, setting("log_level")] = None,
) -> None:
    """Serve models over HTTP: chat, completions, embeddings, as OpenAI's clients know them.

    Without options, the bundled SmolLM2-135M-Instruct is served on http://127.0.0.1:8000, and the API is described
    there under /docs.
    """
    from serving.cli.serve import run_server

    run_server(
        load_settings(
            model=given(model),
            host=host,
            port=port,
            adapter=given(adapter),
            keep_alive_s=keep_alive,
            memory_budget_bytes=memory_budget,
            context_tokens=context_tokens,
            parallel=parallel,
            prompt_chunk_tokens=prompt_chunk_tokens,
            prefix_memory_bytes=prefix_memory,
            threads=threads,
            flash_attention=flash_attention,
            packed_weights=packed_weights,
            huge_pages=huge_pages,
            expert_memory_bytes=expert_memory,
            expert_checksums=expert_checksums,
            draft=draft,
            adapt=adapt,
            adapt_after_s=adapt_after,
            queue_limit=queue_limit,
            guard=guard,
            guard_level=guard_level,
            guard_on_error=guard_on_error,
            guard_allow=given(guard_allow),
            guard_block=given(guard_block),
            api_key_file=api_key_file,
            allowed_host=given(allowed_host),
            cors_origin=given(cors_origin),
            max_body_bytes=max_body,
            max_file_bytes=max_file,
            request_timeout_s=request_timeout,
            grace_seconds=grace_seconds,
            log_level=log_level,
        )
    )


@app.command()
def chat(
    model: Annotated[str | None, typer.Option("--model", "-m", help="A GGUF path or a pulled model's name.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="A LoRA adapter to talk to: the name of a stored one, or NAME=PATH.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="A system message to begin with.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from tokens of this total probability.")] = 0.95,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed and conversation give the same answers.")] = None,
    threads: Annotated[int | None, setting("threads", "--threads", "-t")] = None,
    context_tokens: Annotated[int | None, setting("context_tokens", "--context-tokens", "-c")] = None,
    guard: Annotated[str | None, setting("guard")] = None,
    guard_level: Annotated[str | None, setting("guard_level")] = None,
) -> None:
    """Talk to a model in the terminal. Ctrl-C stops an answer, /reset starts over, /exit or Ctrl-D leaves."""
    from serving.cli.chat import ChatOptions, run_chat

    settings = load_settings(
        model=(model,) if model else None,
        adapter=(adapter,) if adapter else None,
        threads=threads,
        context_tokens=context_tokens,
        guard=guard,
        guard_level=guard_level,
        parallel=1,
        log_level="error",
    )
    name = adapter.partition("=")[0] if adapter else None
    run_chat(settings, ChatOptions(system, temperature, top_p, max_tokens, seed, name))


@app.command()
def bench(
    model: Annotated[str | None, typer.Option("--model", "-m", help="A GGUF path or a pulled model's name.")] = None,
    threads: Annotated[int | None, setting("threads", "--threads", "-t")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=16, max=8192, help="Length of the prompt to read.")] = 512,
    tokens: Annotated[int, typer.Option(min=8, max=2048, help="Tokens to generate in each sequence.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Measurements of each figure; the median counts.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Measure how fast this machine reads prompts and generates tokens, for 1 to 8 answers at a time."""
    from serving.cli.bench import run_bench

    # Made-up prompts repeat themselves: drafts would measure that.
    settings = load_settings(model=(model,) if model else None, threads=threads, draft="none", log_level="error")
    run_bench(settings, prompt_tokens=prompt_tokens, tokens=tokens, rounds=rounds, as_json=as_json)
