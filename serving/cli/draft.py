"""`edgellm draft`: small drafters for speculative decoding, made on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from serving.cli.options import setting

draft_app = typer.Typer(
    name="draft",
    help="Make small models that draft for others (edgellm serve --draft).",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@draft_app.callback()
def draft() -> None:
    """Make small models that draft for others (edgellm serve --draft)."""


@draft_app.command("make")
def make(
    target: Annotated[str, typer.Option("--target", help="The model to draft for: a GGUF path or a name.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            "-d",
            help='JSON lines: {"messages": [...]}, or {"prompt": [...], "answer": [...]} in the target\'s tokens. '
            "Where there is no answer, the target answers first.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the drafter (.gguf).")],
    source: Annotated[str | None, typer.Option("--from", help="The model to cut. Default: the bundled one.")] = None,
    layers: Annotated[int, typer.Option(min=1, max=1000, help="Layers that stay.")] = 4,
    choose: Annotated[
        Literal["first", "ends", "even"],
        typer.Option(help="Which: the first, the first and the very last (ends), or evenly spread ones."),
    ] = "even",
    vocabulary: Annotated[
        int, typer.Option(min=0, help="Most tokens of its vocabulary, which must be BPE. 0: all of them.")
    ] = 16384,
    weights: Annotated[Literal["Q8_0", "Q4_1", "Q4_0"], typer.Option(help="How weights are written.")] = "Q8_0",
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Times to read the data.")] = 10,
    time: Annotated[
        str | None, typer.Option("--time", help="Most time for training (20m, 8h): less is trained if need be.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3,
    softness: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="How much what else the target might have written counts, beside what it wrote. 0: not."
        ),
    ] = 0.0,
    answer_tokens: Annotated[int, typer.Option(min=1, max=8192, help="Most tokens the target answers with.")] = 256,
    low_priority: Annotated[bool, typer.Option(help="Whether everything else on the machine goes first.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Decides the order of the answers, and which are held out.")] = 0,
    threads: Annotated[int | None, setting("threads", "--threads", "-t")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what happens as JSON, one object a line.")] = False,
) -> None:
    """Cut a model to a few layers and train it on what the target answers, as a drafter of little cost.

    A tenth of the answers is held out. The drafter is measured on them beside the whole model and the untrained cut:
    how many drafted tokens the target would accept, the tokens of a target call, and the time of a token. Ctrl-C ends
    the training, and the best weights so far are written.
    """
    from serving.cli.draft_run import DraftRequest, run_make

    request = DraftRequest(
        source=source,
        target=target,
        data=data,
        output=output,
        layers=layers,
        choice=choose,
        vocabulary=vocabulary,
        weights=weights,
        epochs=epochs,
        time=time,
        learning_rate=learning_rate,
        softness=softness,
        answer_tokens=answer_tokens,
        low_priority=low_priority,
        seed=seed,
        threads=threads,
    )
    run_make(request, as_json=as_json)
