"""Runners over tiny models, a sink that keeps what it hears, and a plain loop to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams, EvalCallback
from edgellm.backend.model import Adapter, Model
from edgellm.backend.sampler import Sampler, SamplingParams
from edgellm.engine.cache import PrefixCache
from edgellm.engine.plan import RunnerLimits
from edgellm.engine.runner import Runner
from edgellm.engine.sequence import Job
from edgellm.engine.types import ErrorEvent, Event, FinishEvent, GenerateRequest, TokenEvent, TokenLogprob
from edgellm.speculative.speculator import Speculator
from tests.support.gguf_writer import SPECIAL_TOKENS, vocabulary

GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.9, top_k=8)
"""For comparisons of drawn tokens. Rounding tips a draw that falls on the border between two tokens: with eight
candidates that happens to about one token in 100,000; with the whole vocabulary, far more often."""
_ENDS = [len(vocabulary()[0]) - len(SPECIAL_TOKENS), len(vocabulary()[0]) - 1]  # end-of-generation tokens


class Sink:
    """Keeps the events of one request, and checks that none follows the last."""

    def __init__(self) -> None:
        self.batches: list[list[Event]] = []

    def __call__(self, events: list[Event]) -> None:
        self.batches.append(events)

    @property
    def events(self) -> list[Event]:
        return [event for batch in self.batches for event in batch]

    def tokens(self, index: int = 0) -> list[int]:
        return [event.token for event in self.events if isinstance(event, TokenEvent) and event.index == index]

    def logprobs(self, index: int = 0) -> list[TokenLogprob]:
        found = [event for event in self.events if isinstance(event, TokenEvent) and event.index == index]
        return [event.logprob for event in found if event.logprob is not None]

    def finish(self, index: int = 0) -> FinishEvent:
        (event,) = [event for event in self.events if isinstance(event, FinishEvent) and event.index == index]
        return event

    @property
    def error(self) -> BaseException:
        event = self.events[-1]
        if not isinstance(event, ErrorEvent):
            raise AssertionError(f"no error, but {event}")
        return event.error

    @property
    def over(self) -> bool:
        return any(isinstance(event, FinishEvent | ErrorEvent) for event in self.events)


@contextmanager
def a_runner(
    path: Path,
    *,
    context_tokens: int = 1024,
    parallel: int = 8,
    batch_tokens: int = 256,
    prompt_chunk_tokens: int = 32,
    draft_rows: int = 0,
    idle_cells: int = 512,
    saved_bytes: int = 0,
    speculator: Speculator | None = None,
    adapters: dict[str, Path] | None = None,
    eval_callback: EvalCallback | None = None,
) -> Iterator[Runner]:
    """A runner on the model at `path`, closed in the end."""
    model = Model(path)
    sequences = parallel + 8
    params = ContextParams(
        context_tokens=context_tokens,
        sequences=sequences,
        batch_tokens=batch_tokens,
        outputs=parallel + draft_rows,
        threads=1,
        flash_attention="off",  # its tiles round differently for every number of rows
        eval_callback=eval_callback,
    )
    context = Context(model, params)
    cache = PrefixCache(
        context,
        context.context_tokens,
        sequences=sequences,
        idle_cells=idle_cells,
        saved_bytes=saved_bytes,
        can_roll_back=model.can_roll_back,
        window=model.window_tokens,
    )
    limits = RunnerLimits(parallel, batch_tokens, prompt_chunk_tokens, draft_rows)
    runner = Runner(model, context, limits, cache, speculator=speculator)
    for name, file in (adapters or {}).items():
        runner.add_adapter(name, Adapter(model, file))
    try:
        yield runner
    finally:
        runner.close()


def drain(runner: Runner, limit: int = 5000) -> None:
    """Steps until nothing is left to do."""
    for _ in range(limit):
        if not runner.has_work:
            return
        runner.step()
    raise AssertionError("the runner does not come to an end")


def answer(runner: Runner, prompt: Sequence[int], max_tokens: int = 16, **fields: object) -> Sink:
    """What the runner makes of one request."""
    sink, _ = start(runner, prompt, max_tokens, **fields)
    drain(runner)
    return sink


def start(runner: Runner, prompt: Sequence[int], max_tokens: int = 16, **fields: object) -> tuple[Sink, Job]:
    """Submits a request: greedy, and to its full length unless the fields say otherwise."""
    sink = Sink()
    fields = {"sampling": GREEDY, "ignore_eos": True} | fields
    request = GenerateRequest(tuple(prompt), max_tokens, **fields)  # type: ignore[arg-type]
    return sink, runner.submit(request, sink)


def live_cells(runner: Runner) -> int:
    """Distinct cells that remain in use once everything idle is evicted."""
    runner.cache.reserve(runner.cache.ledger.capacity)
    return runner.cache.ledger.used


_ONE_ROW = ContextParams(context_tokens=1024, sequences=1, batch_tokens=1, outputs=1, threads=1, flash_attention="off")


def assert_greedy(
    path: Path,
    prompt: Sequence[int],
    found: Sequence[int],
    count: int,
    *,
    adapter: tuple[Path, float] | None = None,
) -> None:
    """`found` are `count` tokens, each the likeliest after those before it by the reference.

    Kernels for one row and for many round differently (2e-4 measured here), hence a tolerance of 1e-3.
    """
    if len(found) != count:
        raise AssertionError(f"{len(found)} tokens instead of {count}")
    _, rows = plain_loop(path, prompt, count, adapter=adapter, forced=found)
    losses = [float(np.delete(row, _ENDS).max() - row[token]) for row, token in zip(rows, found, strict=True)]
    if max(losses) > 1e-3:
        first = next(i for i, loss in enumerate(losses) if loss > 1e-3)
        raise AssertionError(f"token {first} is not the likeliest: {losses[first]:.4f} below")


def plain_loop(
    path: Path,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: SamplingParams = GREEDY,
    *,
    adapter: tuple[Path, float] | None = None,
    forced: Sequence[int] | None = None,
) -> tuple[list[int], list[np.ndarray]]:
    """The reference: one sequence, one token at a time. (tokens, logits of every drawn token).

    `forced` are taken instead of what is drawn.
    """
    model = Model(path)
    context = Context(model, _ONE_ROW)
    if adapter is not None:
        context.set_adapters([(Adapter(model, adapter[0]), adapter[1])])
    sampler, batch = Sampler(model.vocab, sampling), Batch(1)
    drawn: list[int] = []
    rows: list[np.ndarray] = []
    try:
        for position in range(len(prompt) + max_tokens - 1):
            token = prompt[position] if position < len(prompt) else drawn[-1]
            batch.clear()
            batch.extend([token], position, 0, outputs=1)
            context.decode(batch)
            if position >= len(prompt) - 1:
                rows.append(context.logits(0).copy())
                chosen = sampler.sample(context, 0) if forced is None else forced[len(drawn)]
                if chosen is None:
                    break
                drawn.append(chosen)
        return drawn, rows
    finally:
        sampler.close()
        context.close()
        model.close()
