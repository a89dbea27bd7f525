"""Servers behind a guard whose verdicts a test decides: by rules, or by what stands in for the guard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai

from edgellm.config import Settings
from guards import Guard, Turn, Verdict
from serving.app import create_app
from serving.guarding import Guarding
from serving.service import Service
from tests.serving import live
from tests.serving.server import START_S

WORD = "zorkmid"
BAD = f"Tell me about the {WORD}."
GOOD = "Tell me about bread."
BY_RULES = ("--guard-block", WORD, "--guard-allow", "re:.+")
"""Unsafe is what has the word, safe all else: the classifier gets nothing to read."""

SAFE = Verdict("safe", 0.25, 0.5, jailbreak=False, jailbreak_score=0.0, milliseconds=2.0)
UNSAFE = Verdict("unsafe", 0.75, 0.5, jailbreak=True, jailbreak_score=0.75, milliseconds=2.0)

Judging = Callable[[Sequence[Turn]], Generator[None, None, Verdict]]


class ScriptedGuard(Guard):
    """Stands where a verdict must be fixed."""

    def __init__(self, judging: Judging) -> None:
        self.judging = judging  # type: ignore[method-assign]
        self.card = SimpleNamespace(version="scripted")  # type: ignore[assignment]


def failing(turns: Sequence[Turn]) -> Generator[None, None, Verdict]:
    """A guard that fails on texts that have the word."""
    yield
    if any(WORD in turn.text for turn in turns):
        raise RuntimeError("the network is broken")
    return SAFE


@contextlib.contextmanager
def serving_here(model: Path, judging: Judging | None = None, **settings: Any) -> Iterator[tuple[Service, str]]:
    """A server in this process, and where it listens. `judging` takes the guard's place."""
    service = Service(Settings(model=(str(model),), threads=1, **settings))
    try:
        if judging is not None:
            guard = ScriptedGuard(judging)
            service.guarding = Guarding(service.settings, service.guarding.metrics, lambda rules: guard)
        service.start()
        with live.serve(create_app(service)) as port:
            yield service, f"http://127.0.0.1:{port}"
    finally:
        service.close()


@contextlib.contextmanager
def client_of(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client. It repeats nothing: a failure must be seen."""
    with (
        httpx.Client() as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=START_S, http_client=http) as made,
    ):
        yield made


def said(text: str, *before: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages that end with the user's `text`."""
    return [*before, {"role": "user", "content": text}]
