"""Answers that take long: server-sent events, and plain answers that stop when the client goes away.

Why not sse-starlette's EventSourceResponse: it cuts every stream the moment the process gets SIGTERM (and patches
uvicorn on import to do so), where running answers are meant to have `grace_seconds`; it starts the response before the
first event, so that an error while the prompt is read could not have its own HTTP status; and it costs 39 us of CPU a
chunk where this costs 17 and a bare StreamingResponse 16 (medians; two shared x86 cores, uvicorn with httptools and
uvloop, chunks of 230 bytes). Why not StreamingResponse: under ASGI 2.4 and later it notices a disconnect only when it
sends, and nothing is sent while a long prompt is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serving.errors import error_body, error_response, log_error
from serving.wire.common import ResponseModel
from serving.wire.error import ErrorEnvelope

PING_S = 15.0
"""A comment is sent after this many seconds of silence, so that proxies keep the connection."""

_PING = b": ping\n\n"
_DONE = b"data: [DONE]\n\n"
_FAIR_EVERY = 64  # a backlog of events is sent without waiting for anything; others must have their turn
_T = TypeVar("_T")

Event = ResponseModel | bytes
"""One event: a model to serialise, or JSON that is ready (one line, UTF-8)."""


def _frame(event: Event) -> bytes:
    data = event if isinstance(event, bytes) else event.to_json()
    return b"data: " + data + b"\n\n"


def _body(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _disconnected(receive: Receive) -> None:
    """Return once the client has gone away. What is left of the request's body is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of server-sent events made from an async iterator; see `sse_response`."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[Event], on_disconnect: Callable[[], None] | None, ping_s: float) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(None, 200, headers)
        del self.headers["content-length"]
        self._events = events
        self._on_disconnect = on_disconnect
        self._ping_s = ping_s
        self._started = False
        self._ended = False
        self._sent = False  # since the pinger last looked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pump events until they end or the client goes away. The iterator lives in one task from start to end."""
        pump = asyncio.create_task(self._pump(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        ping = asyncio.create_task(self._keep_alive(send))
        try:
            await asyncio.wait((pump, gone), return_when=asyncio.FIRST_COMPLETED)
            if not self._ended and self._on_disconnect is not None:
                self._on_disconnect()
        finally:
            await _cancel(gone, ping, pump)
        if not pump.cancelled():
            pump.result()

    async def _pump(self, scope: Scope, receive: Receive, send: Send) -> None:
        count = 0
        try:
            try:
                async for event in self._events:
                    data = _frame(event)
                    if not self._started:
                        await self._start(send)
                    self._sent = True
                    await send(_body(data))
                    count += 1
                    if count % _FAIR_EVERY == 0:
                        await asyncio.sleep(0)
            finally:
                await _close(self._events)
        except Exception as exc:
            self._ended = True
            log_error(exc)
            if not self._started:
                await error_response(exc)(scope, receive, send)
                return
            # No [DONE] after an error: who only looks for the end must not take this for a complete answer.
            await send(_body(_frame(ErrorEnvelope(error=error_body(exc))), more=False))
            return
        if not self._started:
            await self._start(send)
        self._ended = True
        await send(_body(_DONE, more=False))

    async def _start(self, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment whenever a whole interval went by in silence; the first one starts the response."""
        while True:
            await asyncio.sleep(self._ping_s)
            if self._ended:
                return
            if not self._sent:
                if not self._started:
                    await self._start(send)
                await send(_body(_PING))
            self._sent = False


async def _close(events: AsyncIterator[Event]) -> None:
    """Close a generator that stands at a yield; nothing to do for other iterators."""
    if isinstance(events, AsyncGenerator):
        await events.aclose()


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait until they are through with their cleaning up."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def sse_response(
    events: AsyncIterator[Event], *, on_disconnect: Callable[[], None] | None = None, ping_s: float = PING_S
) -> EventStream:
    """`data: {json}` for each event, then `data: [DONE]`.

    - The response starts with the first event: an exception raised before it becomes an ordinary error response with
      its own status. A prompt that takes longer than `ping_s` seconds starts the response with a ping, as 200.
    - A later exception becomes `data: {"error": ...}` and ends the stream without [DONE]; the openai client raises
      APIError. A traceback is logged unless it is an EdgeLLMError.
    - When the client goes away, also while nothing is being sent, `on_disconnect` is called and the iterator is
      cancelled at its await, or closed at its yield; the response waits until it is through.
    """
    return EventStream(events, on_disconnect, ping_s)


async def run_until_disconnect(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled if the client goes away first; then raises ClientDisconnect.

    The request's body must have been read before. Cancelling the caller cancels `work` too.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
    finally:
        await _cancel(gone, task)
    return task.result()
