"""`edgellm moe pack`. Imported when it runs: `--help` must be quick."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from edgellm.config import home_dir
from edgellm.engine.threads import default_threads
from edgellm.errors import ConfigError, ModelUnsupportedError
from edgellm.models.describe import describe
from edgellm.models.gguf_write import Numbers
from edgellm.models.memory import available_memory_bytes
from edgellm.models.packs import PACK_NAME_END
from edgellm.models.split import model_stem
from edgellm.models.store import ModelStore
from edgellm.moe.layout import ExpertLayout, read_layout
from edgellm.moe.narrowing import Bench, choose
from edgellm.moe.pack import check_packable, write_pack
from edgellm.moe.sample_text import sample_text
from edgellm.moe.widths import Choice
from serving.cli.text_files import read_text

_MIB = 1 << 20
_ROOM_SHARE = 0.8  # of the available memory, for the model that is measured


@dataclass(frozen=True, slots=True)
class PackRequest:
    """What the command was given."""

    model: str
    output: Path | None
    loss_target: float | None
    text: Path | None
    tokens: int
    measurements: int
    expert_memory_bytes: int | None


def parse_loss(text: str) -> float:
    """`2%` or `0.02` as a number. Raises ConfigError."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"--loss-target: {text!r} is no part of the perplexity; write 2% or 0.02")
    return value


def run_pack(request: PackRequest, *, as_json: bool) -> None:
    """Writes a pack of the model, and prints what it is."""
    found = ModelStore().find(request.model)
    layout = read_layout(found.path, packed=True)
    if layout is None:
        raise ModelUnsupportedError(f"{found.path.name} has no experts")
    target = request.output or found.path.with_name(f"{model_stem(found.path.name)}{PACK_NAME_END}.gguf")
    check_packable(found.path, target)
    facts: dict[str, Any] = {"model": found.path.name, "pack": str(target)}
    with _bars(quiet=as_json) as bars:
        choice = text = None
        if request.loss_target is not None:
            text = _read_text(request, layout, bars)
            choice = _measured(request, layout, text, facts, bars)
        task = bars.add_task("writing the pack", total=None)
        size = write_pack(
            found.path,
            target,
            widths=None if choice is None else choice.widths,
            facts=None if choice is None else _keys(choice),
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
        packed = read_layout(target)
        assert packed is not None
        facts |= {"file_bytes": describe(found.path).file_bytes, "pack_bytes": size}
        facts |= {"expert_bytes": layout.all_read_bytes, "pack_expert_bytes": packed.all_read_bytes}
        if text is not None:
            _check(request, layout, packed, text, facts, bars)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, line in _lines(facts):
        Console().print(f"[bold]{name:22}[/bold] {line}", highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class _Text:
    """What is measured on."""

    chosen_on: list[int]  # tokens
    fresh: list[int]  # as many others, or none
    usage: npt.NDArray[np.float64]  # (layers, experts)


def _read_text(request: PackRequest, layout: ExpertLayout, bars: Progress) -> _Text:
    task = bars.add_task("how often each expert is used", total=None)
    text = sample_text() if request.text is None else read_text(request.text)
    bench = _bench(request, layout)
    tokens = bench.tokens(text[: 2 * request.tokens * 16])
    if len(tokens) < request.tokens:
        raise ConfigError(f"the text has {len(tokens)} tokens, and {request.tokens} are to be read")
    chosen_on, fresh = tokens[: request.tokens], tokens[request.tokens : 2 * request.tokens]
    found = _Text(chosen_on, fresh if len(fresh) == request.tokens else [], bench.usage(chosen_on))
    bars.update(task, completed=1, total=1)
    return found


def _measured(request: PackRequest, layout: ExpertLayout, text: _Text, facts: dict[str, Any], bars: Progress) -> Choice:
    task = bars.add_task("measuring", total=None)

    def told(done: int, most: int, what: str) -> None:
        bars.update(task, completed=done, total=most, description=f"measuring {what}")

    choice = choose(
        _bench(request, layout),
        text.chosen_on,
        text.usage,
        loss_target=request.loss_target or 0.0,
        measurements=request.measurements,
        progress=told,
    )
    bars.update(task, completed=1, total=1, description="measured")
    bits, counts = np.unique(choice.widths, return_counts=True)
    facts["loss_target"] = request.loss_target
    facts["measurements"] = choice.measurements
    facts["experts_by_bits"] = {str(int(bit)): int(count) for bit, count in zip(bits, counts, strict=True)}
    facts["perplexity"], facts["pack_perplexity"] = choice.base_perplexity, choice.perplexity
    return choice


def _check(
    request: PackRequest,
    layout: ExpertLayout,
    packed: ExpertLayout,
    text: _Text,
    facts: dict[str, Any],
    bars: Progress,
) -> None:
    """Text that took no part in the choice, read by the model and by the pack; and what a token reads of each."""
    facts["token_bytes"], facts["pack_token_bytes"] = _token_bytes(layout, text.usage), _token_bytes(packed, text.usage)
    if not text.fresh:
        return
    task = bars.add_task("other text", total=2)
    found = []
    for experts in (layout, packed):
        found.append(_bench(request, experts).perplexity(text.fresh))
        bars.update(task, advance=1)
    before, now = found
    facts["held_out"] = {"tokens": before.scored_tokens, "perplexity": before.value, "pack_perplexity": now.value}


def _token_bytes(layout: ExpertLayout, usage: npt.NDArray[np.float64]) -> int:
    """Bytes of the experts that a token uses, in the middle."""
    stored = np.zeros(usage.shape)
    for piece in layout.slices:
        stored[piece.layer] += [piece.stored_bytes(expert) for expert in range(layout.experts)]
    tokens = usage.sum() / (layout.layers * max(1, layout.experts_used))
    return round(float((usage * stored).sum() / max(1.0, tokens)))


def _bench(request: PackRequest, layout: ExpertLayout) -> Bench:
    budget = request.expert_memory_bytes
    if budget is None:
        info = describe(layout.headers[0])
        budget = int(available_memory_bytes() * _ROOM_SHARE) - (info.tensor_bytes - info.expert_bytes)
    budget = min(max(budget, layout.least_bytes), layout.whole_bytes)
    return Bench(layout, budget, home_dir(), default_threads())


def _keys(choice: Choice) -> dict[str, Numbers | str]:
    return {"edgellm.pack.perplexity": Numbers("float32", (choice.base_perplexity, choice.perplexity))}


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    def both(before: str, after: str, unit: int = _MIB) -> str:
        return f"{facts[before] / unit:,.1f} MiB, packed {facts[after] / unit:,.1f} MiB"

    yield "pack", facts["pack"]
    yield "file", both("file_bytes", "pack_bytes")
    yield "experts", both("expert_bytes", "pack_expert_bytes")
    if "token_bytes" in facts:
        yield "experts of a token", both("token_bytes", "pack_token_bytes")
        names = {"0": "as they were"}
        held = [f"{count} {names.get(bits, f'at {bits} bits')}" for bits, count in facts["experts_by_bits"].items()]
        yield "widths", ", ".join(held)
        yield "perplexity", _rise(facts["perplexity"], facts["pack_perplexity"])
    if "held_out" in facts:
        yield "  of other text", _rise(facts["held_out"]["perplexity"], facts["held_out"]["pack_perplexity"])


def _rise(before: float, after: float) -> str:
    return f"{before:.3f}, packed {after:.3f} ({after / before - 1:+.2%})"


@contextmanager
def _bars(*, quiet: bool) -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bars:
        yield bars
