"""What `edgellm guard` does. Imported when one of its commands runs: `--help` must be quick."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import typer

from edgellm.config import load_settings
from edgellm.errors import EdgeLLMError
from guards import Guard, GuardError, Level, Rules, Verdict

UNSAFE, UNUSABLE = 1, 2
_LEADING = 0.5  # categories from this share of the score on are told


@dataclass(frozen=True, slots=True)
class LevelledGuard:
    """A guard, and the name of its threshold."""

    guard: Guard
    level: Level


def guard_of(level: str | None, allow: tuple[str, ...] | None, block: tuple[str, ...] | None) -> LevelledGuard:
    """As the server has it: what is not given comes from the settings. Ends the command if there is none."""
    with usage_errors():
        settings = load_settings(guard_level=level, guard_allow=allow, guard_block=block)
        rules = Rules(settings.guard_allow, settings.guard_block)
        return LevelledGuard(Guard(settings.guard_level, rules=rules), settings.guard_level)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Deliberate errors end the command with one line on stderr and status 2: 1 is a verdict."""
    try:
        yield
    except (EdgeLLMError, GuardError) as error:
        fail(str(error))


def fail(*lines: str) -> NoReturn:
    """Ends the command with status 2."""
    for line in lines:
        typer.echo(f"edgellm: {line}", err=True)
    raise typer.Exit(UNUSABLE)


def run_check(levelled: LevelledGuard, text: str, *, as_json: bool) -> None:
    """Prints the verdict on a text, or on standard input. Ends the command with status 1 if it is unsafe."""
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    verdict = levelled.guard.check(text)
    if as_json:
        facts = {"level": levelled.level, **dataclasses.asdict(verdict)}
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        for name, value in _lines(verdict, levelled.level):
            typer.echo(f"{name:<12}{value}")
    if verdict.unsafe:
        raise typer.Exit(UNSAFE)


def _lines(verdict: Verdict, level: Level) -> Iterator[tuple[str, Any]]:
    yield "label", verdict.label
    yield "score", f"{verdict.score:.3f} (over {verdict.threshold:.3f} is unsafe: {level})"
    yield "jailbreak", f"{'yes' if verdict.jailbreak else 'no'} ({verdict.jailbreak_score:.3f})"
    if verdict.rule is not None:
        yield "rule", verdict.rule
    ordered = sorted(verdict.categories.items(), key=lambda item: item[1], reverse=True)
    leading = [f"{name} {value:.3f}" for name, value in ordered if value >= _LEADING * verdict.score]
    if verdict.unsafe and leading:
        yield "categories", ", ".join(leading)
    if verdict.window is not None:
        beneath = " (beneath a disguise)" if verdict.window.undisguised else ""
        yield "window", verdict.window.text + beneath
    yield "time", f"{verdict.milliseconds:.1f} ms"
