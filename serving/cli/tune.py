"""`edgellm tune`: fine-tune a model on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from serving.cli.options import setting

tune_app = typer.Typer(
    name="tune",
    add_completion=False,
    invoke_without_command=True,
    subcommand_metavar="[plan]",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Model = Annotated[str | None, typer.Option("--model", "-m", help="A GGUF path or a pulled model's name.")]
_Memory = Annotated[
    str | None, typer.Option("--memory", help="Most memory that training may take (2GiB). Default: what it needs.")
]
_Time = Annotated[
    str | None,
    typer.Option(
        "--time", help="About how long it may take (20m, 1h): less is trained if need be. Default: no matter."
    ),
]
_Method = Annotated[
    Literal["supervised", "dpo"],
    typer.Option(help="Learn answers (supervised), or which of two answers is better (dpo)."),
]
_BatchSize = Annotated[int | None, typer.Option(min=1, max=4096, help="Examples a step. Default: at most 8.")]
_Rank = Annotated[int | None, typer.Option(min=1, max=1024, help="Rank of the adapter. Default: 16.")]
_Seed = Annotated[int, typer.Option(min=0, help="The same seed, data and settings give the same order of examples.")]
_Threads = Annotated[int | None, setting("threads", "--threads", "-t")]


@tune_app.callback()
def tune(
    context: typer.Context,
    model: _Model = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Examples, one JSON object a line, as OpenAI has them.")
    ] = None,
    validation: Annotated[Path | None, typer.Option(help="Further examples, to measure on after each epoch.")] = None,
    memory: _Memory = None,
    time: _Time = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Times to read the data. Default: 3 to 10.")
    ] = None,
    batch_size: _BatchSize = None,
    learning_rate_multiplier: Annotated[float | None, typer.Option(help="Of the learning rate we would take.")] = None,
    rank: _Rank = None,
    sparsity: Annotated[
        str,
        typer.Option(
            help="What is trained: auto (what is worth it, see `edgellm tune plan`), none (all), the topmost layers "
            "(top-8), or layers and their matrices (20-29:attn_v)."
        ),
    ] = "auto",
    method: _Method = "supervised",
    beta: Annotated[float | None, typer.Option(help="For dpo: how far answers may go from the model's. [0.1]")] = None,
    seed: _Seed = 0,
    name: Annotated[
        str | None, typer.Option(help="What to call the adapter. Default: the model's name and the data's.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the adapter to this .gguf file, not into the store.")
    ] = None,
    threads: _Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what happens as JSON, one object a line.")] = False,
) -> None:
    """Fine-tune a model on examples: makes a LoRA adapter that `edgellm serve` and `edgellm chat` take.

    Ctrl-C stops after the step at hand; the same command goes on from there. With the adapter come its loss curve
    (.svg) and the metrics of each step (.csv). `edgellm tune plan` tells beforehand what would be trained, in which
    memory.
    """
    if context.invoked_subcommand is not None:
        _refuse_given(context)
        return
    if data is None:
        raise typer.BadParameter("a file of examples is needed", context, param_hint="'--data'")
    from serving.cli.tune_run import TuneRequest, run_tune

    request = TuneRequest(
        model=model,
        data=data,
        validation=validation,
        memory=memory,
        time=time,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate_multiplier=learning_rate_multiplier,
        rank=rank,
        sparsity=sparsity,
        method=method,
        beta=beta,
        seed=seed,
        threads=threads,
    )
    run_tune(request, name=name, output=output, as_json=as_json)


@tune_app.command("plan")
def plan(
    data: Annotated[Path, typer.Option("--data", "-d", help="Examples, one JSON object a line.")],
    model: _Model = None,
    memory: _Memory = None,
    time: _Time = None,
    batch_size: _BatchSize = None,
    rank: _Rank = None,
    method: _Method = "supervised",
    seed: _Seed = 0,
    threads: _Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is found as JSON, one object a line.")] = False,
) -> None:
    """Show what training which layers and matrices would bring, the choices there are, and the one that would be made.

    Gains are measured on the data. The same options given to `edgellm tune` lead to the same choice.
    """
    from serving.cli.tune_run import TuneRequest, run_plan

    request = TuneRequest(
        model=model,
        data=data,
        memory=memory,
        time=time,
        batch_size=batch_size,
        rank=rank,
        method=method,
        seed=seed,
        threads=threads,
    )
    run_plan(request, as_json=as_json)


def _refuse_given(context: typer.Context) -> None:
    """Options before the subcommand would not reach it."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            hint = f"'{parameter.opts[0]}'"
            raise typer.BadParameter(f"must come after `{context.invoked_subcommand}`", context, param_hint=hint)
