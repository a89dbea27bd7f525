"""`edgellm guard eval`: which share of a file's texts the guard holds for unsafe."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from guards.measures import Share
from serving.cli.guard_run import LevelledGuard, fail, usage_errors
from serving.cli.text_files import read_text

_FAULTS_SHOWN = 20
_OPTIONAL = ("kind", "source")
_GROUPS = ("label", *_OPTIONAL)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may have them; no terminal takes them


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the file."""

    text: str
    label: str  # safe or unsafe
    kind: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of the rows."""

    flagged: Share
    right: Share  # flagged and unsafe, or neither
    groups: dict[str, dict[str, Share]]  # label, kind, source -> its value -> of its rows, those flagged


def run_eval(levelled: LevelledGuard, file: Path, *, as_json: bool) -> None:
    """Prints the shares. Ends the command with status 2 if the file has faults."""
    with usage_errors():
        rows, faults = parse_rows(read_text(file))
    if faults:
        shown = [f"{file}: line {line}: {fault}" for line, fault in faults[:_FAULTS_SHOWN]]
        more = len(faults) - len(shown)
        fail(*shown, *([f"{file}: {more} more faults"] if more else []))
    if not rows:
        fail(f"{file} has no rows")
    console = Console(stderr=True)
    counted = track(rows, "Judging", console=console, transient=True, disable=not console.is_terminal)
    flagged = [levelled.guard.check(row.text).unsafe for row in counted]
    found = evaluate(rows, flagged)
    if as_json:
        facts = {"level": levelled.level, "threshold": levelled.guard.threshold, **_facts(found)}
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print(found, levelled)


def parse_rows(text: str) -> tuple[list[Row], list[tuple[int, str]]]:
    """The rows, and the faults with their lines, counted from 1. Empty lines are neither."""
    rows: list[Row] = []
    faults: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line)))
        except json.JSONDecodeError as error:
            faults.append((number, f"not JSON: {error.msg}"))
        except RecursionError:
            faults.append((number, "nested too deeply"))
        except ValueError as error:
            faults.append((number, str(error)))
    return rows, faults


def _row(data: Any) -> Row:
    """Raises ValueError."""
    if not isinstance(data, dict):
        raise ValueError("not an object")
    for name in ("text", *_OPTIONAL):
        value = data.get(name)
        if not isinstance(value, str) and (name == "text" or value is not None):
            raise ValueError(f"{name} must be a string")
        if _LONE_SURROGATE.search(value or ""):
            raise ValueError(f"{name} is not valid Unicode")
    if data.get("label") not in ("safe", "unsafe"):
        raise ValueError("label must be safe or unsafe")
    return Row(data["text"], data["label"], data.get("kind"), data.get("source"))


def evaluate(rows: Sequence[Row], flagged: Sequence[bool]) -> Evaluation:
    """`flagged`: whether each row was held for unsafe."""
    groups = {group: _by([getattr(row, group) for row in rows], flagged) for group in _GROUPS}
    right = _share(flag == (row.label == "unsafe") for row, flag in zip(rows, flagged, strict=True))
    return Evaluation(_share(flagged), right, groups)


def _by(values: Sequence[str | None], flagged: Sequence[bool]) -> dict[str, Share]:
    """The share of each value's rows; rows without a value are in none."""
    flags: dict[str, list[bool]] = {}
    for value, flag in zip(values, flagged, strict=True):
        if value is not None:
            flags.setdefault(value, []).append(flag)
    return {value: _share(flags[value]) for value in sorted(flags)}


def _share(flags: Iterable[bool]) -> Share:
    counted = list(flags)
    return Share(sum(counted), len(counted))


def _facts(found: Evaluation) -> dict[str, Any]:
    groups = {
        group: {name: _share_facts(share) for name, share in each.items()} for group, each in found.groups.items()
    }
    return {"flagged": _share_facts(found.flagged), "accuracy": _share_facts(found.right), **groups}


def _share_facts(share: Share) -> dict[str, Any]:
    low, high = share.interval
    return {"count": share.count, "of": share.of, "share": share.value, "low": low, "high": high}


def _print(found: Evaluation, levelled: LevelledGuard) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("ROWS")
    for heading in ("COUNT", "FLAGGED", "SHARE (95 %)"):
        table.add_column(heading, justify="right", no_wrap=True)
    named = [(f"{group} {name}", share) for group, each in found.groups.items() for name, share in each.items()]
    for name, share in [("all", found.flagged), *named]:
        table.add_row(escape(name), f"{share.of:,}", f"{share.count:,}", str(share))
    console = Console()
    console.print(table)
    threshold = f"{levelled.guard.threshold:.3f}"
    console.print(
        f"accuracy {found.right}: {found.right.count:,} of {found.right.of:,} (level {levelled.level}, "
        f"threshold {threshold})",
        soft_wrap=True,
        highlight=False,
    )
