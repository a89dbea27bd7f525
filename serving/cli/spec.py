"""`edgellm spec`: speculative decoding, as a running server does it."""

from __future__ import annotations

from typing import Annotated

import typer

spec_app = typer.Typer(
    name="spec",
    help="Look into speculative decoding: what is drafted, how much of it is accepted, what that saves.",
    no_args_is_help=True,
    add_completion=False,
)

_Url = Annotated[str, typer.Option("--url", help="Where the server is.")]
_Key = Annotated[str | None, typer.Option("--api-key", help="Its API key.", envvar="EDGELLM_API_KEY")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
_URL = "http://127.0.0.1:8000"


@spec_app.command("stats")
def stats(url: _Url = _URL, api_key: _Key = None, as_json: _Json = False) -> None:
    """Show, for each model of a running server, how many drafted tokens were accepted, the tokens of a target call,
    and the time saved, by proposer."""
    from serving.cli.spec_report import run_stats

    run_stats(url, api_key, as_json=as_json)


@spec_app.command("forget")
def forget(url: _Url = _URL, api_key: _Key = None) -> None:
    """Forget earlier answers and all that was learned from them: on disk, and in the memory of a running server."""
    from serving.cli.spec_report import run_forget

    run_forget(url, api_key)
