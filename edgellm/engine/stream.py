"""The engine's events in asyncio: several requests may report into one stream."""

from __future__ import annotations

import asyncio
import threading
import time

from edgellm.engine.engine import Engine, Ticket
from edgellm.engine.runner import Runner
from edgellm.engine.types import ErrorEvent, Event, GenerateRequest, TokenEvent
from edgellm.errors import RequestTimeoutError

_PATIENCE_S = 0.002
_INTERVAL_S = 0.015  # tokens that come faster than this travel together


class EventLoopBridge:
    """Carries the events of a step from the engine thread into the event loop, all at once.

    Then it waits, for a moment at most, until the loop has sent them on. Where there are no more cores than computing
    threads, a loop that works beside llama.cpp takes a core from one of its threads, while the others spin and wait for
    that one. Waiting costs a few tenths of a millisecond; so tokens of very fast models travel together, at most
    `_INTERVAL_S` seconds late. First tokens and endings never wait.
    """

    def __init__(self, engine: Engine) -> None:
        """Attaches itself to the engine. Create it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._pending: list[_Post] = []
        self._urgent = False
        self._sent_s = 0.0
        self._sent = threading.Event()
        self.engine = engine
        engine.after_step = self._flush

    def post(self, stream: EventStream, number: int, events: list[Event]) -> None:
        """Keeps events for the end of the step. On the engine thread."""
        first = number not in stream.started
        self._urgent = self._urgent or first or any(not isinstance(event, TokenEvent) for event in events)
        stream.started.add(number)
        self._pending.append((stream, number, events, time.perf_counter()))

    def _flush(self) -> None:
        if not self._pending:
            return
        now = time.perf_counter()
        if not self._urgent and now - self._sent_s < _INTERVAL_S:
            return
        pending, self._pending = self._pending, []
        self._urgent, self._sent_s = False, now
        self._sent.clear()
        try:
            self._loop.call_soon_threadsafe(self._deliver, pending)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return
        self._sent.wait(_PATIENCE_S)

    def _deliver(self, pending: list[_Post]) -> None:
        for stream, number, events, drawn_s in pending:
            stream.receive(number, events, drawn_s)
        self._loop.call_soon(self._sent.set)  # its turn comes after the tasks that were woken just now


class EventStream:
    """Submits requests and hands out what becomes of them. Use it in one event loop, and `close` it in the end."""

    def __init__(
        self, bridge: EventLoopBridge, *, timeout_s: float = float("inf"), since_s: float | None = None
    ) -> None:
        """`timeout_s` seconds after `since_s` (time.perf_counter; None: now) a RequestTimeoutError is reported."""
        self._bridge = bridge
        self._loop = asyncio.get_running_loop()
        self._tickets: list[Ticket] = []
        self._events: list[tuple[int, Event, float]] = []
        self.started: set[int] = set()  # requests that have reported something; the engine thread's
        self._waiter: asyncio.Future[None] | None = None
        self._timeout_s = timeout_s
        rest_s = timeout_s if since_s is None else timeout_s - (time.perf_counter() - since_s)
        self._timer = self._loop.call_later(max(rest_s, 0.0), self._expire) if timeout_s < 1e9 else None

    def submit(self, runner: Runner, request: GenerateRequest) -> int:
        """Starts a request. Returns its number, which marks its events."""
        number = len(self._tickets)

        def sink(events: list[Event]) -> None:
            self._bridge.post(self, number, events)

        self._tickets.append(self._bridge.engine.submit(runner, request, sink))
        return number

    async def next(self) -> list[tuple[int, Event, float]]:
        """The events since the last call, with the numbers of their requests and when they came about
        (time.perf_counter); waits for at least one."""
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

    def receive(self, number: int, events: list[Event], drawn_s: float) -> None:
        """Takes events of request `number`. In the event loop."""
        self._events += [(number, event, drawn_s) for event in events]
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _expire(self) -> None:
        error = RequestTimeoutError(f"The request took longer than {self._timeout_s:g} seconds")
        self.receive(0, [ErrorEvent(error)], time.perf_counter())


_Post = tuple[EventStream, int, list[Event], float]
