"""Command-line options made from the settings, so that help texts and defaults are written once."""

from __future__ import annotations

import re
from typing import Any

import typer

from edgellm.config import Settings


def setting(field: str, *names: str) -> Any:
    """A typer option for the setting `field`. The option itself defaults to None: not given."""
    info = Settings.model_fields[field]
    flags = names or ("--" + re.sub(r"_(s|bytes)$", "", field).replace("_", "-"),)
    text = f"{info.description} [EDGELLM_{field.upper()}]"
    return typer.Option(*flags, help=text, show_default=_shown(field, info.default))


def given(values: list[Any] | None) -> tuple[Any, ...] | None:
    """The values of an option that may be repeated; None if it was not given."""
    return tuple(values) if values else None


def _shown(field: str, default: Any) -> str | bool:
    """The default as the user would write it; unset ones are told in the help text."""
    if default is None or default == ():
        return False
    if field.endswith("_bytes") and isinstance(default, int):
        return f"{default // (1 << 20)}MiB"
    if field.endswith("_s") or field.endswith("_seconds"):
        return f"{default // 60:g}m" if default % 60 == 0 and default else f"{default:g}s"
    return str(default)
