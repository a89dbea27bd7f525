"""What is measured on one running server, and how. All times in seconds."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench import client, prompts
from bench.client import Answer, BenchError, HttpStatusError
from bench.servers import Memory, RunningServer, machine_cpu_s

_START_TIMEOUT_S = 180.0
_SAMPLE_WORDS = (60, 360)


@dataclass(frozen=True)
class Workload:
    """The sizes of everything that is sent."""

    clients: tuple[int, ...]
    requests_per_client: int
    answer_tokens: int = 96
    turn_repeats: int = 2
    shared_prefix_tokens: int = 1000
    long_prompt_tokens: int = 2000
    running_stream_tokens: int = 160


@dataclass(frozen=True)
class Startup:
    """From starting the process."""

    health_s: float  # to the first 200 from /health
    first_answer_s: float  # to the end of the first chat answer (one token)


@dataclass(frozen=True)
class Cell:
    """One number of clients, each sending its requests one after the other."""

    total_tokens_per_s: float  # all answer tokens / wall time
    stream_tokens_per_s: float  # median over requests
    ttft_s: tuple[float, ...]  # one a request
    prompt_tokens: tuple[int, ...]  # one a request
    wall_s: float
    server_cpu_s: float
    client_cpu_s: float  # of this script, while it drove the cell
    others_cpu_s: float  # of everything else on the machine: should be next to nothing
    outside_decode: float | None  # share of the engine's loop outside llama_decode; None if the server does not say
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Load:
    """Seconds that some requests took, and processor seconds meanwhile."""

    wall_s: float
    server_cpu_s: float
    client_cpu_s: float  # of this script
    others_cpu_s: float  # of everything else on the machine


@dataclass(frozen=True)
class SecondTurn:
    """TTFT of the second turn of a conversation, and of the same prompt in a conversation never seen before."""

    prompt_tokens: int
    cold_ttft_s: float
    warm_ttft_s: float


@dataclass(frozen=True)
class LongPrompt:
    """A long prompt arrives while another answer is streaming."""

    prompt_tokens: int
    ttft_s: float  # of the long prompt
    longest_gap_s: float  # between two pieces of the running stream, from the arrival of the prompt to its first token
    usual_gap_s: float  # median gap of the running stream before


@dataclass(frozen=True)
class RoundResult:
    """Everything measured in the life of one server process."""

    startup: Startup
    idle: Memory  # after the first answer
    cells: dict[int, Cell]
    second_turn: SecondTurn
    long_prompt: LongPrompt
    loaded: Memory  # after everything else; its peak is the peak of the whole life


_T = TypeVar("_T")


async def measure_startup(server: RunningServer) -> tuple[Startup, Memory]:
    """The start of a server that has just been started, and its memory after the first answer."""
    return await _measure_startup(server), server.memory()


async def measure_round(
    servers: Sequence[RunningServer],
    startups: Sequence[tuple[Startup, Memory]],
    workload: Workload,
    salt: str,
    *,
    reverse: bool,
) -> list[RoundResult]:
    """All further measures, each on every server before the next one, so that they share the machine's good and bad
    minutes; an idle server costs nothing. `reverse` takes the servers in reverse order. `salt` must differ between
    rounds."""
    order = list(range(len(servers)))[:: -1 if reverse else 1]

    async def on_each(measure: Callable[[RunningServer], Awaitable[_T]]) -> list[_T]:
        found = {index: await measure(servers[index]) for index in order}
        return [found[index] for index in range(len(servers))]

    async def warm_up(server: RunningServer) -> tuple[str, float]:
        model = await model_id(server.port)
        slots = range(max(workload.clients))
        chats = [client.chat(server.port, model, prompts.short_prompt(f"{salt} warm-up {i}"), 8) for i in slots]
        await asyncio.gather(*chats)
        return model, await _words_per_token(server.port, model)

    facts = dict(zip((server.port for server in servers), await on_each(warm_up), strict=True))

    async def one_turn(server: RunningServer, number: int) -> SecondTurn:
        model, words = facts[server.port]
        return await _measure_second_turn(
            server.port, model, int(workload.shared_prefix_tokens * words), f"{salt} turn {number}"
        )

    async def long_prompt(server: RunningServer) -> LongPrompt:
        model, words = facts[server.port]
        words_in_all = int(workload.long_prompt_tokens * words)
        return await _measure_long_prompt(server.port, model, workload.running_stream_tokens, words_in_all, salt)

    cells: dict[int, list[Cell]] = {}
    for clients in workload.clients:
        cells[clients] = await on_each(lambda s, n=clients: measure_cell(s, facts[s.port][0], workload, n, salt))  # type: ignore[misc]
    turns = [
        await on_each(lambda s, i=i: one_turn(s, i))  # type: ignore[misc]
        for i in range(workload.turn_repeats)
    ]
    longs = await on_each(long_prompt)
    return [
        RoundResult(
            startups[index][0],
            startups[index][1],
            {clients: found[index] for clients, found in cells.items()},
            _median_turn([turn[index] for turn in turns]),
            longs[index],
            server.memory(),
        )
        for index, server in enumerate(servers)
    ]


async def _measure_startup(server: RunningServer) -> Startup:
    health_s = 0.0
    model = ""
    while time.perf_counter() - server.started_s < _START_TIMEOUT_S:
        server.check_alive()
        try:
            if not health_s:
                status, _ = await client.get(server.port, "/health")
                health_s = time.perf_counter() - server.started_s if status == 200 else 0.0
            if health_s:
                model = model or await model_id(server.port)
                await client.chat(server.port, model, [{"role": "user", "content": "Hi"}], 1)
                return Startup(health_s, time.perf_counter() - server.started_s)
        except OSError:
            pass  # not listening yet
        except HttpStatusError as error:
            if error.status != 503:
                raise
        await asyncio.sleep(0.01)
    raise BenchError(f"the server gave no answer within {_START_TIMEOUT_S:.0f} s")


async def model_id(port: int) -> str:
    """The first model that the server lists."""
    status, body = await client.get(port, "/v1/models")
    if status != 200:
        raise HttpStatusError(status, body)
    return str(json.loads(body)["data"][0]["id"])


async def _words_per_token(port: int, model: str) -> float:
    """How many words of our text make a token of this model, by the server's own count of two texts."""
    short, long = [
        (await client.chat(port, model, prompts.long_prompt("sample", words), 1)).prompt_tokens
        for words in _SAMPLE_WORDS
    ]
    return (_SAMPLE_WORDS[1] - _SAMPLE_WORDS[0]) / (long - short)


async def measure_cell(server: RunningServer, model: str, workload: Workload, clients: int, salt: str) -> Cell:
    """`clients` at a time, each with prompts of its own."""

    async def one_client(number: int) -> list[Answer]:
        return [
            await client.chat(
                server.port, model, prompts.short_prompt(f"{salt} {clients}-{number}-{i}"), workload.answer_tokens
            )
            for i in range(workload.requests_per_client)
        ]

    loop_before = await engine_seconds(server.port)
    found, load = await under_load(server, asyncio.gather(*map(one_client, range(clients))))
    answers = list(itertools.chain.from_iterable(found))
    return Cell(
        total_tokens_per_s=sum(answer.completion_tokens for answer in answers) / load.wall_s,
        stream_tokens_per_s=statistics.median(answer.stream_tokens_per_s for answer in answers),
        ttft_s=tuple(answer.ttft_s for answer in answers),
        prompt_tokens=tuple(answer.prompt_tokens for answer in answers),
        wall_s=load.wall_s,
        server_cpu_s=load.server_cpu_s,
        client_cpu_s=load.client_cpu_s,
        others_cpu_s=load.others_cpu_s,
        outside_decode=_outside_decode(loop_before, await engine_seconds(server.port)),
        texts=tuple(answer.text for answer in answers),
    )


async def under_load(server: RunningServer, work: Awaitable[_T]) -> tuple[_T, Load]:
    """What `work` gives, and who used the processor until it did."""
    machine_s, server_s, client_s = machine_cpu_s(), server.cpu_s(), time.process_time()
    start_s = time.perf_counter()
    found = await work
    wall_s = time.perf_counter() - start_s
    client_s, server_s = time.process_time() - client_s, server.cpu_s() - server_s
    return found, Load(wall_s, server_s, client_s, max(0.0, machine_cpu_s() - machine_s - server_s - client_s))


async def engine_seconds(port: int) -> tuple[float, float] | None:
    """(seconds in the engine's steps, of these in llama_decode) so far, from /metrics; None where it does not say."""
    status, body = await client.get(port, "/metrics")
    if status != 200:
        return None
    totals = {}
    for name in ("edgellm_engine_step_seconds_total", "edgellm_engine_decode_seconds_total"):
        values = re.findall(rf"^{name}(?:{{[^}}]*}})? ([0-9.eE+-]+)$", body.decode(), re.MULTILINE)
        if not values:
            return None
        totals[name] = sum(map(float, values))
    step_s, decode_s = totals.values()
    return step_s, decode_s


def _outside_decode(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    if before is None or after is None or after[0] <= before[0]:
        return None
    return 1 - (after[1] - before[1]) / (after[0] - before[0])


async def _measure_second_turn(port: int, model: str, words: int, salt: str) -> SecondTurn:
    """The same two turns under two salts: one conversation is held, the other comes out of the blue."""
    question = {"role": "user", "content": "Which of these sentences is the most surprising one, and why?"}
    first = prompts.long_prompt(salt, words)
    reply = {"role": "assistant", "content": (await client.chat(port, model, first, 32)).text}
    warm = await client.chat(port, model, [*first, reply, question], 8)
    stranger = [{"role": "system", "content": f"again {first[0]['content']}"}, first[1], reply, question]
    cold = await client.chat(port, model, stranger, 8)
    return SecondTurn(warm.prompt_tokens, cold.ttft_s, warm.ttft_s)


def _median_turn(turns: list[SecondTurn]) -> SecondTurn:
    return SecondTurn(
        prompt_tokens=int(statistics.median(turn.prompt_tokens for turn in turns)),
        cold_ttft_s=statistics.median(turn.cold_ttft_s for turn in turns),
        warm_ttft_s=statistics.median(turn.warm_ttft_s for turn in turns),
    )


async def _measure_long_prompt(port: int, model: str, stream_tokens: int, words: int, salt: str) -> LongPrompt:
    exchange = await client.start_chat(port, model, prompts.short_prompt(f"{salt} running"), stream_tokens)
    await exchange.flowing.wait()
    long_answer = await client.chat(port, model, prompts.long_prompt(f"{salt} long", words), 1)
    running = await client.finish_chat(exchange, stream_tokens)
    return gap_during(running, long_answer)


def gap_during(running: Answer, arriving: Answer) -> LongPrompt:
    """The longest silence of `running` while `arriving` was being read. Raises BenchError if they did not overlap."""
    times_s = running.piece_times_s
    first_token_s = arriving.piece_times_s[0]
    pairs = list(itertools.pairwise(times_s))
    during = [later - earlier for earlier, later in pairs if later > arriving.sent_s and earlier < first_token_s]
    before = [later - earlier for earlier, later in pairs if later <= arriving.sent_s]
    if not during or not before:
        raise BenchError("the running stream was over before the long prompt arrived: make it longer")
    return LongPrompt(arriving.prompt_tokens, arriving.ttft_s, max(during), statistics.median(before))
