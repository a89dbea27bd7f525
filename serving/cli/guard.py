"""`edgellm guard`: the prompt guard in the terminal, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.options import given, setting

guard_app = typer.Typer(
    name="guard",
    help="Ask the prompt guard what it thinks of texts, without a server.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Level = Annotated[str | None, setting("guard_level", "--level")]
_Allow = Annotated[list[str] | None, setting("guard_allow", "--allow")]
_Block = Annotated[list[str] | None, setting("guard_block", "--block")]


@guard_app.command("check")
def check(
    text: Annotated[str, typer.Argument(help="The text to judge; - reads it from standard input.")],
    level: _Level = None,
    allow: _Allow = None,
    block: _Block = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Judge a text as a user's message.

    The exit status is 0 if it is safe, 1 if it is unsafe, and 2 if it cannot be judged.
    """
    from serving.cli.guard_run import guard_of, run_check

    run_check(guard_of(level, given(allow), given(block)), text, as_json=as_json)


@guard_app.command("eval")
def evaluate(
    file: Annotated[
        Path,
        typer.Argument(
            help='JSON lines, plain or .gz: {"text": "...", "label": "safe" or "unsafe"}, with "kind" and "source" '
            "where there are such."
        ),
    ],
    level: _Level = None,
    allow: _Allow = None,
    block: _Block = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Judge the texts of a file, each by itself, and tell which share of them is held for unsafe.

    Shares come with Wilson's 95 % interval: in all, by label, by kind and by source. The exit status is 2 if the file
    has faults, which are told with their lines.
    """
    from serving.cli.guard_eval import run_eval
    from serving.cli.guard_run import guard_of

    run_eval(guard_of(level, given(allow), given(block)), file, as_json=as_json)
