"""A streaming chat client that costs as little as it can: it shares the machine's cores with the server it measures.

While an answer streams in, nothing happens but noting the time and the bytes of each segment; HTTP chunks, server-sent
events and JSON are taken apart when the answer is complete.
"""

from __future__ import annotations

import asyncio
import bisect
import json
import time
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
_FLOWING_SEGMENTS = 24


class BenchError(Exception):
    """The measurement cannot go on. The text is for the person who runs it."""


class HttpStatusError(BenchError):
    """The server answered, but not with 200."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"the server answered {status}: {body[:500].decode('utf-8', 'replace')}")
        self.status = status


@dataclass(frozen=True)
class Answer:
    """One streamed answer. Times are time.perf_counter() readings in seconds."""

    sent_s: float
    piece_times_s: tuple[float, ...]  # arrival of each piece of text; nearly always one token each
    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str = ""
    accepted_tokens: int = 0  # drafted, and confirmed by the model
    rejected_tokens: int = 0  # drafted in vain

    @property
    def ttft_s(self) -> float:
        """From sending the request to the first piece of text; the opening role chunk does not count."""
        return self.piece_times_s[0] - self.sent_s

    @property
    def stream_tokens_per_s(self) -> float:
        """Speed after the first token, as a reader sees it. 0 for a single token."""
        elapsed_s = self.piece_times_s[-1] - self.piece_times_s[0]
        return (self.completion_tokens - 1) / elapsed_s if elapsed_s > 0 else 0.0


class Exchange(asyncio.Protocol):
    """One HTTP/1.1 request on a connection of its own, and the segments that came back with their times."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.sent_s = 0.0
        self.segments: list[tuple[float, bytes]] = []
        self.flowing = asyncio.Event()  # the answer is well under way
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.sent_s = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.segments.append((time.perf_counter(), data))
        if len(self.segments) == _FLOWING_SEGMENTS:
            self.flowing.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.flowing.set()
        if not self.done.done():
            self.done.set_result(None)


def encode_request(method: str, path: str, port: int, body: Any = None) -> bytes:
    """An HTTP/1.1 request that asks for the connection to be closed after the answer."""
    payload = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    if payload:
        head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    return head.encode() + b"\r\n" + payload


async def start(port: int, request: bytes) -> Exchange:
    """Connects and sends. Raises OSError if nothing listens."""
    _, exchange = await asyncio.get_running_loop().create_connection(lambda: Exchange(request), "127.0.0.1", port)
    return exchange


async def finish(exchange: Exchange, timeout_s: float) -> None:
    """Waits until the server has closed the connection."""
    try:
        await asyncio.wait_for(exchange.done, timeout_s)
    except TimeoutError:
        raise BenchError(f"no complete answer within {timeout_s:.0f} s") from None


async def get(port: int, path: str, timeout_s: float = 30.0) -> tuple[int, bytes]:
    """Status and body of a GET. Raises OSError if nothing listens."""
    exchange = await start(port, encode_request("GET", path, port))
    await finish(exchange, timeout_s)
    status, blocks = parse_response(exchange.segments)
    return status, b"".join(block for _, block in blocks)


async def start_chat(port: int, model: str, messages: list[Message], max_tokens: int) -> Exchange:
    """Sends a greedy, streamed chat request that is answered with exactly `max_tokens` tokens."""
    fields = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return await _start_stream(port, {"model": model, "messages": messages, **fields})


async def _start_stream(port: int, body: dict[str, Any]) -> Exchange:
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    return await start(port, encode_request("POST", "/v1/chat/completions", port, streamed))


async def finish_chat(exchange: Exchange, max_tokens: int, timeout_s: float = 600.0) -> Answer:
    """The parsed answer. Raises HttpStatusError, or BenchError if it is not `max_tokens` long."""
    await finish(exchange, timeout_s)
    answer = parse_answer(exchange.sent_s, exchange.segments)
    if answer.completion_tokens != max_tokens:
        raise BenchError(f"asked for {max_tokens} tokens with ignore_eos, got {answer.completion_tokens}")
    return answer


async def chat(port: int, model: str, messages: list[Message], max_tokens: int) -> Answer:
    """start_chat and finish_chat in one."""
    return await finish_chat(await start_chat(port, model, messages, max_tokens), max_tokens)


async def ask(port: int, body: dict[str, Any], timeout_s: float = 600.0) -> Answer:
    """The streamed answer to a chat request that may end by itself, even at once. Raises HttpStatusError."""
    exchange = await _start_stream(port, body)
    await finish(exchange, timeout_s)
    return parse_answer(exchange.sent_s, exchange.segments, may_be_empty=True)


def parse_response(segments: list[tuple[float, bytes]]) -> tuple[int, list[tuple[float, bytes]]]:
    """(status, [(arrival in seconds, body bytes), ...]) of a complete HTTP/1.1 response.

    A block of a chunked body has arrived when its last byte has. Raises BenchError for what is not HTTP or broke off.
    """
    data = b"".join(part for _, part in segments)
    ends, total = [], 0
    for _, part in segments:
        total += len(part)
        ends.append(total)
    head, found, _ = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    words = lines[0].split(b" ", 2)
    if not found or len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise BenchError(f"not a complete HTTP answer: {data[:100]!r}")
    status, position = int(words[1]), len(head) + 4
    if not any(line.lower().replace(b" ", b"") == b"transfer-encoding:chunked" for line in lines[1:]):
        return status, [(segments[-1][0], data[position:])]
    blocks: list[tuple[float, bytes]] = []
    while True:
        line_end = data.find(b"\r\n", position)
        try:
            size = int(data[position:line_end].split(b";")[0], 16) if line_end >= 0 else -1
        except ValueError:
            size = -1
        block_end = line_end + 2 + size
        if size < 0 or block_end > len(data):
            raise BenchError("the answer broke off in the middle")
        if size == 0:
            return status, blocks
        arrival_s = segments[bisect.bisect_left(ends, block_end)][0]
        blocks.append((arrival_s, data[line_end + 2 : block_end]))
        position = block_end + 2


def parse_events(blocks: list[tuple[float, bytes]]) -> list[tuple[float, str]]:
    """[(arrival in seconds, data), ...] of a server-sent event stream; comments (pings) are left out."""
    events, pending = [], b""
    for arrival_s, block in blocks:
        pending += block
        if pending.endswith(b"\r"):  # half a line end: the other half opens the next block
            continue
        *complete, pending = pending.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in complete:
            data = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            if data:
                events.append((arrival_s, b"\n".join(data).decode()))
    return events


def parse_answer(sent_s: float, segments: list[tuple[float, bytes]], *, may_be_empty: bool = False) -> Answer:
    """The chat answer in a recorded exchange. Raises HttpStatusError or BenchError.

    An empty answer, where there may be one, counts as a piece of no text that came with its end.
    """
    if not segments:
        raise BenchError("the server closed the connection without an answer")
    status, blocks = parse_response(segments)
    if status != 200:
        raise HttpStatusError(status, b"".join(block for _, block in blocks))
    times_s: list[float] = []
    text, reason, usage, drafts = "", "", None, (0, 0)
    for arrival_s, data in parse_events(blocks):
        if data == "[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise BenchError(f"error in mid-stream: {chunk['error']}")
        usage = chunk.get("usage") or usage
        drafts = _drafts(chunk) or drafts
        reason = "".join(choice.get("finish_reason") or "" for choice in chunk["choices"]) or reason
        piece = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        if piece:
            times_s.append(arrival_s)
            text += piece
    if usage is None or not (times_s or may_be_empty):
        raise BenchError("the stream held no text or no usage")
    times = tuple(times_s) or (segments[-1][0],)
    return Answer(sent_s, times, text, usage["prompt_tokens"], usage["completion_tokens"], reason, *drafts)


def _drafts(chunk: dict[str, Any]) -> tuple[int, int] | None:
    """Drafted tokens (accepted, rejected): OpenAI's counts, or llama-server's. None if the chunk has neither."""
    if timings := chunk.get("timings"):
        accepted = timings.get("draft_n_accepted", 0)
        return accepted, timings.get("draft_n", 0) - accepted
    details = (chunk.get("usage") or {}).get("completion_tokens_details")
    if details:
        return details.get("accepted_prediction_tokens", 0), details.get("rejected_prediction_tokens", 0)
    return None
