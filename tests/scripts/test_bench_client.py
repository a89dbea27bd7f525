"""The benchmark's client: what it reads off the wire, and whom it blames."""

from __future__ import annotations

import asyncio
import contextlib
import json
from itertools import pairwise

import pytest
from bench import client, measures, prompts, report
from bench.client import Answer, BenchError, HttpStatusError
from hypothesis import given
from hypothesis import strategies as st

SENT_S = 100.0


def chunk(content: str | None = None, usage: dict[str, int] | None = None, **fields: object) -> str:
    choices = [] if usage else [{"index": 0, "delta": {"role": "assistant", "content": content}}]
    return json.dumps({"choices": choices, "usage": usage, **fields})


def stream(events: list[str], line_end: str = "\n", status: str = "200 OK") -> bytes:
    """A chunked response with one HTTP chunk for each event."""
    body = b""
    for event in events:
        data = f"data: {event}{line_end}{line_end}".encode()
        body += f"{len(data):x}\r\n".encode() + data + b"\r\n"
    return f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + body + b"0\r\n\r\n"


USAGE = {"prompt_tokens": 7, "completion_tokens": 3}
EVENTS = [chunk(""), chunk("Grüße"), chunk(" an"), chunk(" alle"), chunk(usage=USAGE), "[DONE]"]


@given(cuts=st.sets(st.integers(1, len(stream(EVENTS)) - 1)), line_end=st.sampled_from(["\n", "\r\n"]))
def test_answer_is_the_same_however_the_bytes_arrive(cuts: set[int], line_end: str) -> None:
    data = stream(EVENTS, line_end)
    borders = [0, *sorted(cuts), len(data)]
    segments = [(SENT_S + i, data[a:b]) for i, (a, b) in enumerate(pairwise(borders))]
    answer = client.parse_answer(SENT_S, segments)
    assert answer.text == "Grüße an alle"
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 3)
    assert len(answer.piece_times_s) == 3
    assert list(answer.piece_times_s) == sorted(answer.piece_times_s)


def test_times_are_those_of_the_segment_that_completed_the_piece() -> None:
    parts = [stream([event])[:-5].split(b"\r\n\r\n", 1)[1] for event in EVENTS]
    head = stream([]).split(b"0\r\n")[0]
    segments = [(SENT_S + 1, head + parts[0])]  # the role alone
    segments += [(SENT_S + 2 + i, part) for i, part in enumerate(parts[1:])] + [(SENT_S + 9, b"0\r\n\r\n")]
    answer = client.parse_answer(SENT_S, segments)
    assert answer.piece_times_s == (SENT_S + 2, SENT_S + 3, SENT_S + 4)
    assert answer.ttft_s == 2
    assert answer.stream_tokens_per_s == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (stream(EVENTS)[:-60], "broke off"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not a complete HTTP answer"),
        (stream([chunk(""), "[DONE]"]), "no text"),
        (stream([chunk("a"), json.dumps({"error": {"message": "out of cells"}})]), "out of cells"),
        (b"", "without an answer"),
    ],
)
def test_bad_answers_are_errors(data: bytes, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        client.parse_answer(SENT_S, [(SENT_S, data)] if data else [])


def test_status_comes_with_the_body() -> None:
    data = b'HTTP/1.1 503 Service Unavailable\r\nContent-Length: 8\r\n\r\n{"no":1}'
    with pytest.raises(HttpStatusError, match="503") as caught:
        client.parse_answer(SENT_S, [(SENT_S, data)])
    assert caught.value.status == 503


@given(st.binary(max_size=300))
def test_garbage_never_escapes_as_anything_else(data: bytes) -> None:
    with contextlib.suppress(BenchError):
        client.parse_response([(0.0, data), (1.0, b"")])


def test_request_and_answer_over_a_real_socket() -> None:
    received = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        received.append(json.loads(await reader.readexactly(length)))
        writer.write(stream(EVENTS, "\r\n"))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def talk() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            answer = await client.chat(port, "m", prompts.short_prompt("salt"), 3)
            assert answer.text == "Grüße an alle"
            with pytest.raises(BenchError, match="asked for 4 tokens with ignore_eos, got 3"):
                await client.chat(port, "m", prompts.short_prompt("salt"), 4)

    asyncio.run(talk())
    assert (received[0]["ignore_eos"], received[0]["temperature"], received[0]["max_tokens"]) == (True, 0, 3)


def test_gap_counts_only_while_the_prompt_is_read() -> None:
    running = Answer(0.0, (1.0, 1.1, 1.2, 1.3, 2.3, 2.4, 9.0), "", 1, 7)
    arriving = Answer(1.25, (2.35,), "", 2000, 1)
    gap = measures.gap_during(running, arriving)
    assert gap.longest_gap_s == pytest.approx(1.0)
    assert gap.usual_gap_s == pytest.approx(0.1)
    with pytest.raises(BenchError, match="over before"):
        measures.gap_during(running, Answer(20.0, (21.0,), "", 2000, 1))


def test_prompts_are_fixed_and_differ_from_their_first_words() -> None:
    made = [prompts.short_prompt(f"round 1 4-{i}") for i in range(50)]
    assert made == [prompts.short_prompt(f"round 1 4-{i}") for i in range(50)]
    assert len({prompt[0]["content"][:8] for prompt in made}) == 50
    assert len(prompts.text_of_words("x", 500).split()) in range(500, 520)


def test_percentile_is_a_value_that_occurred() -> None:
    values = [float(i) for i in range(1, 21)]
    assert report.percentile(values, 0.5) == 10
    assert report.percentile(values, 0.95) == 19
    assert report.percentile([3.0], 0.95) == 3
