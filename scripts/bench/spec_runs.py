"""Servers with and without speculative decoding, and what is measured on them for scripts/bench_spec."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import client, prompts, servers
from bench.client import Answer, BenchError
from bench.measures import Load, measure_startup, model_id, under_load
from bench.servers import Contender, Limits, RunningServer
from bench.spec_tasks import Task
from edgellm.engine.draft_loading import FREE

OURS, RIVAL = "edgellm", "llama-server"
RIVAL_MODES = ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")
"""Ways of llama-server to draft without a model (`--spec-type`), which have defaults of their own."""

_SAMPLE = re.compile(r"^(\w+)\{([^}]*)\} ([0-9.eE+-]+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_REFUSAL = re.compile(r"\b((?:draft model|the target and draft|failed to initialize speculative).*)", re.IGNORECASE)
_COMPLAINT = re.compile(r"must (closely )?match|not compatible|failed|not supported", re.IGNORECASE)


@dataclass(frozen=True)
class Side:
    """One server as it is measured. `base` is the name of the same server without drafting, None if it is that."""

    name: str
    contender: Contender
    base: str | None


@dataclass
class Counts:
    """Drafted tokens."""

    accepted: int = 0
    rejected: int = 0

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that the model confirmed; None if nothing was drafted."""
        drafted = self.accepted + self.rejected
        return self.accepted / drafted if drafted else None


@dataclass(frozen=True)
class Cell:
    """The answers of one server to one workload, by one number of clients."""

    answers: tuple[Answer, ...]  # in the order of the tasks
    load: Load
    proposers: dict[str, Counts] = field(default_factory=dict)  # as /metrics tells them apart

    @property
    def tokens_per_s(self) -> float:
        """All answer tokens / wall time."""
        return sum(answer.completion_tokens for answer in self.answers) / self.load.wall_s

    @property
    def ttft_s(self) -> float:
        """Median."""
        return statistics.median(answer.ttft_s for answer in self.answers)

    @property
    def drafts(self) -> Counts:
        """By the usage of the answers."""
        accepted = sum(answer.accepted_tokens for answer in self.answers)
        return Counts(accepted, sum(answer.rejected_tokens for answer in self.answers))

    @property
    def tokens_a_step(self) -> float:
        """Each call of the model gives an answer one token of its own and those that it confirms."""
        tokens = sum(answer.completion_tokens for answer in self.answers)
        return tokens / max(1, tokens - self.drafts.accepted)


Results = dict[tuple[str, int], dict[str, list[Cell]]]  # (workload, clients) -> side's name -> rounds


def named_options(text: str) -> tuple[str, list[str]]:
    """`NAME` or `NAME:OPTIONS` as it is written on the command line."""
    name, _, options = text.partition(":")
    return name, shlex.split(options)


def our_sides(command: list[str], limits: Limits, drafts: Sequence[str], extra: list[str], *, same: bool) -> list[Side]:
    """edgellm without drafting, and with each of `drafts`: `--draft`'s value, or `VALUE:OPTIONS`.

    `same` leaves `--draft` away everywhere, which measures the method's own noise, or what OPTIONS alone do.
    """
    sides = [Side(OURS, servers.edgellm(command, limits, [*([] if same else ["--draft", "none"]), *extra]), None)]
    for text in drafts:
        value, options = named_options(text)
        # A drafter that adapts while another server is measured would take that one's processors.
        fixed = [] if value in FREE else ["--adapt", "off"]
        flags = [*([] if same else ["--draft", value, *fixed]), *options]
        name = " ".join((OURS, Path(value).stem if value.endswith(".gguf") else value, *options))
        sides.append(Side(name, servers.edgellm(command, limits, [*flags, *extra]), OURS))
    return sides


def rival_sides(binary: Path, limits: Limits, modes: Sequence[str], draft: Path | None, extra: list[str]) -> list[Side]:
    """llama-server without drafting, with each of `modes` (`TYPE` or `TYPE:OPTIONS`), and with a drafter's file."""
    sides = [Side(RIVAL, servers.llama_server(binary, limits, extra), None)]
    ways = [(" ".join((RIVAL, mode, *options)), ["--spec-type", mode, *options]) for mode, options in _named(modes)]
    if draft is not None:
        flags = ["--spec-type", "draft-simple", "--spec-draft-model", str(draft), "-td", str(limits.threads)]
        ways.append((f"{RIVAL} {draft.stem}", flags))
    sides += [Side(name, servers.llama_server(binary, limits, [*flags, *extra]), RIVAL) for name, flags in ways]
    return sides


def _named(texts: Sequence[str]) -> list[tuple[str, list[str]]]:
    return [named_options(text) for text in texts]


def refusal(log: str) -> str:
    """What llama-server says of a drafter that it does not use; it serves on without. Empty if it says nothing."""
    said = [found[1].strip() for line in log.splitlines() if (found := _REFUSAL.search(line))]
    return "; ".join(dict.fromkeys(line for line in said if _COMPLAINT.search(line)))


def proposer_counts(exposition: str) -> dict[str, Counts]:
    """Drafted tokens by proposer so far, from /metrics.

    Any counter with a label `proposer` counts whose name, or another label, says accepted or rejected; or drafted, of
    which the accepted are a part.
    """
    sums: dict[str, dict[str, int]] = {}
    for name, labels_text, value in _SAMPLE.findall(exposition):
        labels = dict(_LABEL.findall(labels_text))
        proposer = labels.pop("proposer", None)
        if proposer is None or name.endswith("_created"):
            continue
        said = f"{name} {labels.get('outcome', '')} {labels.get('result', '')}"
        kind = next((kind for kind in ("accepted", "rejected", "drafted", "proposed") if kind in said), None)
        if kind is not None:
            of = sums.setdefault(proposer, {})
            of[kind] = of.get(kind, 0) + int(float(value))
    return {proposer: _counts(of) for proposer, of in sums.items()}


def _counts(of: Mapping[str, int]) -> Counts:
    accepted, drafted = of.get("accepted", 0), of.get("drafted", 0) or of.get("proposed", 0)
    return Counts(accepted, of["rejected"] if "rejected" in of else max(0, drafted - accepted))


def _since(before: dict[str, Counts], after: dict[str, Counts]) -> dict[str, Counts]:
    none = Counts()
    return {
        name: Counts(now.accepted - before.get(name, none).accepted, now.rejected - before.get(name, none).rejected)
        for name, now in after.items()
    }


async def _proposers(port: int) -> dict[str, Counts]:
    status, body = await client.get(port, "/metrics")
    return proposer_counts(body.decode()) if status == 200 else {}


@dataclass(frozen=True)
class Asking:
    """What all requests have in common."""

    max_tokens: int
    temperature: float


async def measure_cell(server: RunningServer, model: str, tasks: Sequence[Task], clients: int, asking: Asking) -> Cell:
    """`clients` at a time, each taking the next task when it has its answer."""
    answers: dict[int, Answer] = {}
    queue = iter(enumerate(tasks))

    async def one_client() -> None:
        for index, task in queue:
            body = task.body(model, asking.max_tokens, asking.temperature)
            answers[index] = await client.ask(server.port, body)

    before = await _proposers(server.port)
    _, load = await under_load(server, asyncio.gather(*(one_client() for _ in range(clients))))
    counts = _since(before, await _proposers(server.port))
    return Cell(tuple(answers[index] for index in range(len(tasks))), load, counts)


@contextlib.contextmanager
def started(sides: Sequence[Side], model: Path, refused: dict[str, str]) -> Iterator[dict[str, RunningServer]]:
    """The servers of all sides, warmed up one after the other. Those that refuse their drafter are noted and left."""
    with contextlib.ExitStack() as stack:
        running: dict[str, RunningServer] = {}
        for side in sides:
            if side.name in refused:
                continue
            server = stack.enter_context(servers.running(side.contender, model))
            asyncio.run(_warm_up(server))
            if side.base == RIVAL and (why := refusal(server.log.read_text(errors="replace"))):
                refused[side.name] = why
                server.stop()
                print(f"{side.name} does not draft: {why}", file=sys.stderr, flush=True)
            else:
                running[side.name] = server
        yield running


async def _warm_up(server: RunningServer) -> None:
    await measure_startup(server)
    model = await model_id(server.port)
    chats = [client.chat(server.port, model, prompts.short_prompt(f"warm-up {i}"), 8) for i in range(4)]
    await asyncio.gather(*chats)


def measure_round(
    running: Mapping[str, RunningServer],
    plan: Mapping[tuple[str, int], Sequence[Task]],
    asking: Asking,
    number: int,
    results: Results,
) -> None:
    """Every cell of `plan` on each server before the next one. The order is reversed from cell to cell, and a cell's
    from round to round."""
    for index, ((workload, clients), tasks) in enumerate(plan.items()):
        order = list(running)[:: -1 if (index + number) % 2 else 1]
        for name in order:
            running[name].check_alive()
            cell = asyncio.run(_measured(running[name], tasks, clients, asking))
            results.setdefault((workload, clients), {}).setdefault(name, []).append(cell)
            said = f"{cell.tokens_per_s:.1f} tok/s, {cell.tokens_a_step:.2f} tokens a step"
            print(f"{workload}, {clients} clients, {name}: {said}", file=sys.stderr, flush=True)


async def _measured(server: RunningServer, tasks: Sequence[Task], clients: int, asking: Asking) -> Cell:
    return await measure_cell(server, await model_id(server.port), tasks, clients, asking)


def check_command(command: list[str], *, same: bool) -> None:
    """Raises BenchError if edgellm does not run, or knows nothing of --draft."""
    try:
        done = subprocess.run([*command, "serve", "--help"], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        raise BenchError(f"edgellm: {command[0]} does not run: {error.strerror}; scripts/serve sets it up") from None
    if not same and "--draft" not in done.stdout:
        raise BenchError(f"{shlex.join(command)} serve has no --draft: --same measures it against itself")
