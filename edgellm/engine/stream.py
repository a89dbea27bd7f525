"""The engine's events in asyncio: several requests may report into one stream."""

from __future__ import annotations

import asyncio
import contextlib

from edgellm.engine.engine import Engine, Ticket
from edgellm.engine.runner import Runner
from edgellm.engine.types import ErrorEvent, Event, GenerateRequest
from edgellm.errors import RequestTimeoutError


class EventStream:
    """Submits requests and hands out what becomes of them. Use it in one event loop, and `close` it in the end."""

    def __init__(self, engine: Engine, *, timeout_s: float = float("inf")) -> None:
        """After `timeout_s` seconds everything is cancelled, and every request reports a RequestTimeoutError."""
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._tickets: list[Ticket] = []
        self._events: list[tuple[int, Event]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._timeout_s = timeout_s
        self._timer = self._loop.call_later(timeout_s, self._expire) if timeout_s < 1e9 else None

    def submit(self, runner: Runner, request: GenerateRequest) -> int:
        """Starts a request. Returns its number, which marks its events."""
        number = len(self._tickets)

        def sink(events: list[Event]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._receive, number, events)

        self._tickets.append(self._engine.submit(runner, request, sink))
        return number

    async def next(self) -> list[tuple[int, Event]]:
        """The events since the last call, with the numbers of their requests; waits for at least one."""
        while not self._events:
            self._waiter = self._loop.create_future()
            await self._waiter
        events, self._events = self._events, []
        return events

    def cancel(self, number: int, index: int) -> None:
        """Answer `index` of request `number` is complete for the caller's purposes."""
        self._tickets[number].cancel(index)

    def close(self) -> None:
        """Cancels what is still running. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        tickets, self._tickets = self._tickets, []
        for ticket in tickets:
            ticket.cancel()

    def _receive(self, number: int, events: list[Event]) -> None:
        self._events += [(number, event) for event in events]
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _expire(self) -> None:
        error = RequestTimeoutError(f"The request took longer than {self._timeout_s:g} seconds")
        self._receive(0, [ErrorEvent(error)])
