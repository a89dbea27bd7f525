"""The command `edgellm`. Each subcommand is a module here, imported only when it runs: `--help` must be quick."""

from __future__ import annotations

import sys

from serving.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point. Deliberate errors are one line on stderr and exit status 1."""
    from edgellm.errors import EdgeLLMError

    try:
        app()
    except EdgeLLMError as error:
        print(f"edgellm: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
