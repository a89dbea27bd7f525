"""`edgellm bench`: how fast this machine runs a model, through the engine that serves it."""

from __future__ import annotations

import contextlib
import json
import queue
import random
import statistics
import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from edgellm.config import Settings
from edgellm.engine.loaded import LoadedModel
from edgellm.engine.types import ErrorEvent, Event, FinishEvent, GenerateRequest, SamplingParams, TokenEvent
from serving.service import Service

_WIDTHS = (1, 2, 4, 8)
_DECODE_PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class _Figure:
    what: str
    width: int
    rate: float  # tokens a second, median
    low: float
    high: float


def run_bench(settings: Settings, *, prompt_tokens: int, tokens: int, rounds: int, as_json: bool) -> None:
    """Measures and prints. Raises EdgeLLMError if the model cannot be loaded or the prompt is too long for it."""
    console = Console(stderr=as_json)
    with contextlib.closing(Service(settings)) as service:
        started = time.perf_counter()
        with Console(stderr=True).status(f"Loading {service.models.default} ..."):
            service.start()
        load_s = time.perf_counter() - started
        model, _ = service.models.resolve(None)
        with service.models.use(model) as loaded:
            bench = _Bench(service, loaded, tokens)
            prompt_tokens = min(prompt_tokens, loaded.context_tokens - 1)
            widths = [width for width in _WIDTHS if width <= settings.parallel]
            figures = []
            with Progress(console=Console(stderr=True), transient=True) as progress:
                task = progress.add_task("Measuring", total=(1 + len(widths)) * rounds + 1)
                bench.generate(1)  # warm-up
                progress.advance(task)
                rates = []
                for _ in range(rounds):
                    rates.append(bench.read(prompt_tokens))
                    progress.advance(task)
                figures.append(_figure("prompt", prompt_tokens, rates))
                for width in widths:
                    rates = []
                    for _ in range(rounds):
                        rates.append(bench.generate(width))
                        progress.advance(task)
                    figures.append(_figure("generate", width, rates))
            threads = loaded.runner.context.params.threads
            _print(console, model.name, loaded.info.quantisation, threads, load_s, figures, as_json=as_json)


def _figure(what: str, width: int, rates: list[float]) -> _Figure:
    return _Figure(what, width, statistics.median(rates), min(rates), max(rates))


def _print(
    console: Console,
    name: str,
    quantisation: str,
    threads: int,
    load_s: float,
    figures: list[_Figure],
    *,
    as_json: bool,
) -> None:
    if as_json:
        rows = [
            {"what": f.what, "width": f.width, "tokens_per_s": f.rate, "min": f.low, "max": f.high} for f in figures
        ]
        body = {"model": name, "quantisation": quantisation, "threads": threads, "load_s": load_s, "figures": rows}
        print(json.dumps(body))  # noqa: T201
        return
    console.print(f"{name} ({quantisation}), {threads} threads, loaded in {load_s:.1f} s", soft_wrap=True)
    table = Table()
    table.add_column("")
    table.add_column("tokens/s", justify="right")
    table.add_column("min - max", justify="right")
    for figure in figures:
        label = f"read a prompt of {figure.width}" if figure.what == "prompt" else f"generate, {figure.width} at a time"
        table.add_row(label, f"{figure.rate:.1f}", f"{figure.low:.1f} - {figure.high:.1f}")
    console.print(table)


class _Bench:
    """Random tokens as prompts: what they say does not matter to the speed, and no prefix is found in the cache."""

    def __init__(self, service: Service, loaded: LoadedModel, tokens: int) -> None:
        self._service = service
        self._loaded = loaded
        self._tokens = tokens
        self._random = random.Random(0)  # noqa: S311

    def _run(self, prompts: int, prompt_tokens: int, tokens: int) -> list[float]:
        """When each token came, in seconds since the start."""
        vocabulary = self._loaded.vocab.n_tokens
        events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        started = time.perf_counter()
        for _ in range(prompts):
            prompt = tuple(self._random.randrange(vocabulary) for _ in range(prompt_tokens))
            request = GenerateRequest(prompt, tokens, SamplingParams(temperature=0), ignore_eos=True)
            self._service.engine.submit(self._loaded.runner, request, events.put)
        times: list[float] = []
        open_prompts = prompts
        while open_prompts:
            for event in events.get():
                if isinstance(event, ErrorEvent):
                    raise event.error
                if isinstance(event, TokenEvent):
                    times.append(time.perf_counter() - started)
                open_prompts -= isinstance(event, FinishEvent)
        return times

    def read(self, prompt_tokens: int) -> float:
        """Prompt tokens a second, up to the first token."""
        return prompt_tokens / self._run(1, prompt_tokens, 1)[0]

    def generate(self, width: int) -> float:
        """Generated tokens a second over all sequences, from the last sequence's start on."""
        times = self._run(width, _DECODE_PROMPT_TOKENS, self._tokens)
        return (len(times) - width) / (times[-1] - times[width - 1])
