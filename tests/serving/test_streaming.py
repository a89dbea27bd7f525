"""Streams on real sockets: framing, errors before and after the first event, clients that go away."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgellm.errors import BackendError, OverloadedError
from serving.streaming import Event, run_until_disconnect, sse_response
from serving.wire.chat import ChatCompletionChunk, ChunkChoice, Delta
from tests.serving.live import Connection, serve

HEADERS = [("Host", "127.0.0.1"), ("Content-Length", "0")]
WAIT_S = 10


def chunk(delta: Delta, finish: Any = None) -> ChatCompletionChunk:
    return ChatCompletionChunk(
        id="chatcmpl-1", created=1, model="m", choices=[ChunkChoice(index=0, delta=delta, finish_reason=finish)]
    )


class Stage:
    """The application under test, with what its generators saw."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        self.told = threading.Event()

    async def plain(self) -> AsyncIterator[Event]:
        yield chunk(Delta(role="assistant", content="", refusal=None))
        yield chunk(Delta(content="héllo\n\ndata: x"))
        yield chunk(Delta(), "stop")

    async def empty(self) -> AsyncIterator[Event]:
        return
        yield b""

    async def fails_at_once(self) -> AsyncIterator[Event]:
        raise OverloadedError("The queue is full.", retry_after_s=7)
        yield b""

    async def fails_later(self) -> AsyncIterator[Event]:
        yield chunk(Delta(role="assistant", content="a"))
        raise BackendError("llama_decode returned -3")

    async def breaks_later(self) -> AsyncIterator[Event]:
        yield chunk(Delta(role="assistant", content="a"))
        raise KeyError("a secret")

    async def never(self) -> AsyncIterator[Event]:
        """A prompt that is being read for ever."""
        self.begun.set()
        try:
            async with asyncio.timeout(60):  # needs to live in one task
                await asyncio.Event().wait()
            yield b"{}"
        finally:
            self.cancelled.set()

    async def one_then_never(self) -> AsyncIterator[Event]:
        yield chunk(Delta(role="assistant", content="a"))
        async for event in self.never():
            yield event

    async def endless(self) -> AsyncIterator[Event]:
        """Faster than a client that does not read: the generator is stopped at its yield."""
        try:
            while True:
                yield b'"' + b"x" * 60_000 + b'"'
                self.begun.set()
        finally:
            self.cancelled.set()

    async def stream(self, request: Request) -> Response:
        events = getattr(self, request.path_params["name"])()
        ping_s = float(request.query_params.get("ping_s", "15"))
        return sse_response(events, on_disconnect=self.told.set, ping_s=ping_s)

    async def work(self, request: Request) -> Response:
        await request.body()

        async def wait() -> str:
            self.begun.set()
            try:
                if "quick" not in request.query_params:
                    await asyncio.Event().wait()
                return "done"
            finally:
                self.cancelled.set()

        return Response(await run_until_disconnect(request, wait()))


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def port(stage: Stage) -> Iterator[int]:
    from serving.errors import UnexpectedErrors

    routes = [
        Route("/work", stage.work, methods=["POST"]),
        Route("/{name}", stage.stream, methods=["POST"]),
        Route("/{name}/chat/completions", stage.stream, methods=["POST"]),
    ]
    with serve(UnexpectedErrors(Starlette(routes=routes))) as port:
        yield port


def ask(port: int, path: str) -> Any:
    with Connection(port) as connection:
        connection.send("POST", path, HEADERS)
        return connection.answer()


def client(port: int, name: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/{name}", api_key="k", max_retries=0)


def chat(port: int, name: str) -> Any:
    return client(port, name).chat.completions.create(
        model="m", messages=[{"role": "user", "content": "x"}], stream=True
    )


def test_framing_and_headers(port: int) -> None:
    answer = ask(port, "/plain")
    assert answer.status == 200
    assert answer.header("content-type") == "text/event-stream; charset=utf-8"
    assert answer.header("cache-control") == "no-cache"
    assert answer.header("x-accel-buffering") == "no"
    *events, done, nothing = answer.body.decode().split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert deltas == [{"role": "assistant", "content": "", "refusal": None}, {"content": "héllo\n\ndata: x"}, {}]


def test_each_event_is_sent_at_once(port: int, stage: Stage) -> None:
    with Connection(port) as connection:
        connection.send("POST", "/one_then_never", HEADERS)
        assert connection.head().status == 200
        assert next(connection.chunks()).startswith(b"data: {")


def test_stream_without_events(port: int) -> None:
    assert ask(port, "/empty").body == b"data: [DONE]\n\n"


def test_the_connection_lives_on(port: int) -> None:
    with Connection(port) as connection:
        for _ in range(3):
            connection.send("POST", "/plain", HEADERS)
            assert connection.answer().body.endswith(b"[DONE]\n\n")


def test_openai_client_reads_it(port: int) -> None:
    texts = [part.choices[0].delta.content for part in chat(port, "plain")]
    assert texts == ["", "héllo\n\ndata: x", None]


def test_error_before_the_first_event_has_its_status(port: int) -> None:
    answer = ask(port, "/fails_at_once")
    assert answer.status == 503
    assert answer.header("retry-after") == "7"
    assert answer.header("content-type") == "application/json"
    assert answer.error["code"] == "overloaded"
    with pytest.raises(openai.InternalServerError, match="The queue is full"):
        chat(port, "fails_at_once")


def test_error_in_mid_stream(port: int) -> None:
    answer = ask(port, "/fails_later")
    assert answer.status == 200
    last = answer.body.decode().rstrip("\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"] == {
        "message": "llama_decode returned -3",
        "type": "server_error",
        "param": None,
        "code": "backend_error",
    }
    stream = chat(port, "fails_later")
    assert next(stream).choices[0].delta.content == "a"
    with pytest.raises(openai.APIError, match="llama_decode returned -3"):
        next(stream)


def test_unexpected_error_in_mid_stream_is_logged_not_told(port: int, caplog: pytest.LogCaptureFixture) -> None:
    answer = ask(port, "/breaks_later")
    assert b"secret" not in answer.body
    assert b'"code":"internal_error"' in answer.body
    [record] = [record for record in caplog.records if record.name == "serving.errors"]
    assert record.exc_info is not None
    assert "a secret" in str(record.exc_info[1])


def test_ping_while_a_prompt_is_read(port: int, stage: Stage) -> None:
    with Connection(port) as connection:
        connection.send("POST", "/never?ping_s=0.05", HEADERS)
        assert connection.head().status == 200
        chunks = connection.chunks()
        assert [next(chunks) for _ in range(3)] == [b": ping\n\n"] * 3
    assert stage.cancelled.wait(WAIT_S)


@pytest.mark.parametrize("name", ["never", "one_then_never", "endless"])
def test_disconnect_cancels_at_once(port: int, stage: Stage, name: str) -> None:
    connection = Connection(port)
    connection.send("POST", f"/{name}", HEADERS)
    assert stage.begun.wait(WAIT_S)
    assert not stage.cancelled.is_set()
    connection.close()
    assert stage.cancelled.wait(WAIT_S)
    assert stage.told.wait(WAIT_S)


def test_no_disconnect_is_told_of_a_whole_stream(port: int, stage: Stage) -> None:
    ask(port, "/plain")
    ask(port, "/fails_later")
    assert not stage.told.is_set()


def test_closing_the_openai_stream_cancels(port: int, stage: Stage) -> None:
    stream = chat(port, "one_then_never")
    next(stream)
    assert stage.begun.wait(WAIT_S)
    stream.close()
    assert stage.cancelled.wait(WAIT_S)


def test_plain_answer(port: int) -> None:
    assert ask(port, "/work?quick=1").body == b"done"


def test_plain_answer_is_cancelled_with_its_client(port: int, stage: Stage) -> None:
    connection = Connection(port)
    connection.send("POST", "/work", HEADERS)
    assert stage.begun.wait(WAIT_S)
    assert not stage.cancelled.is_set()
    connection.close()
    assert stage.cancelled.wait(WAIT_S)
    assert ask(port, "/plain").status == 200


@pytest.mark.parametrize("half", [b"", b"POST /never HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\nabc"])
def test_half_a_request_harms_nobody(port: int, half: bytes) -> None:
    connection = Connection(port)
    connection.socket.sendall(half)
    connection.close()
    assert ask(port, "/plain").status == 200


def test_cancelling_the_response_cancels_the_iterator() -> None:
    """As the server does with what is left when its grace is over."""

    async def run() -> list[str]:
        seen: list[str] = []

        async def events() -> AsyncIterator[Event]:
            try:
                yield b"{}"
                seen.append("begun")
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)  # cleaning up may take its time
                seen.append("closed")

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            seen.append(message["type"])

        task = asyncio.create_task(sse_response(events())({"type": "http"}, receive, send))
        while "begun" not in seen:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return seen

    assert asyncio.run(run()) == ["http.response.start", "http.response.body", "begun", "closed"]
