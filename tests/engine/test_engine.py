"""The engine thread: requests from many threads, cancellation, failure and the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgellm.engine.engine import Engine
from edgellm.engine.runner import Runner
from edgellm.engine.types import Event, GenerateRequest
from edgellm.errors import BackendError, ShuttingDownError
from tests.engine.rig import GREEDY, Sink, a_runner, assert_greedy

PROMPT = tuple(b"hello world")
PATIENCE_S = 30


class _Waiting(Sink):
    """A sink that other threads can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()
        self.started = threading.Event()
        self.threads: set[str] = set()

    def __call__(self, events: list[Event]) -> None:
        self.threads.add(threading.current_thread().name)
        super().__call__(events)
        self.started.set()
        if self.over:
            self.ended.set()

    def wait(self) -> _Waiting:
        assert self.ended.wait(PATIENCE_S)
        return self


def _request(prompt: tuple[int, ...] = PROMPT, max_tokens: int = 8) -> GenerateRequest:
    return GenerateRequest(prompt, max_tokens, GREEDY, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


@pytest.fixture
def runner(llama: Path, engine: Engine) -> Iterator[Runner]:
    with a_runner(llama, context_tokens=4096) as made:
        engine.add(made)
        yield made
        engine.close()


def test_requests_from_many_threads(engine: Engine, runner: Runner, llama: Path) -> None:
    def ask(number: int) -> _Waiting:
        sink = _Waiting()
        engine.submit(runner, _request((*PROMPT, 65 + number), 6 + number), sink)
        return sink.wait()

    with ThreadPoolExecutor(8) as pool:
        sinks = list(pool.map(ask, range(16)))
    for number, sink in enumerate(sinks):
        assert_greedy(llama, (*PROMPT, 65 + number), sink.tokens(), 6 + number)
        assert sink.threads == {"edgellm-engine"}


def test_cancel_before_the_start(engine: Engine, runner: Runner) -> None:
    gate, sink = threading.Event(), _Waiting()
    engine.post(lambda: gate.wait(PATIENCE_S) and None)  # the thread is busy, so the request cannot have begun
    ticket = engine.submit(runner, _request(), sink)
    ticket.cancel()
    ticket.cancel()
    gate.set()
    after = _Waiting()
    engine.submit(runner, _request(), after)
    after.wait()
    assert sink.events == []


def test_cancel_while_it_runs(engine: Engine, runner: Runner) -> None:
    sink = _Waiting()
    ticket = engine.submit(runner, _request(max_tokens=4000), sink)
    assert sink.started.wait(PATIENCE_S)
    ticket.cancel()
    engine.call(lambda: None).result(PATIENCE_S)  # the cancellation was posted before this
    assert engine.call(lambda: runner.has_work).result(PATIENCE_S) is False
    assert not sink.over
    ticket.cancel()


def test_close_ends_what_runs_and_takes_nothing_new(engine: Engine, runner: Runner) -> None:
    running, late = _Waiting(), _Waiting()
    engine.submit(runner, _request(max_tokens=4000), running)
    assert running.started.wait(PATIENCE_S)
    engine.close()
    engine.close()
    assert isinstance(running.wait().error, ShuttingDownError)
    engine.submit(runner, _request(), late)
    assert isinstance(late.error, ShuttingDownError)


def test_after_the_end_nobody_waits_in_vain(engine: Engine, runner: Runner, llama: Path) -> None:
    engine.close()
    with pytest.raises(ShuttingDownError):
        engine.call(lambda: 5).result(PATIENCE_S)
    with pytest.raises(ShuttingDownError):
        engine.add(runner)
    engine.remove(runner)  # closed already
    engine.post(lambda: None)


def test_remove_ends_the_requests_of_one_worker(engine: Engine, runner: Runner, llama: Path) -> None:
    with a_runner(llama) as other:
        engine.add(other)
        leaving, staying = _Waiting(), _Waiting()
        engine.submit(other, _request(max_tokens=900), leaving)
        engine.submit(runner, _request(max_tokens=30), staying)
        assert leaving.started.wait(PATIENCE_S)
        engine.remove(other)
        assert isinstance(leaving.wait().error, ShuttingDownError)
    assert len(staying.wait().tokens()) == 30


def test_a_step_that_raises_fails_its_requests_and_the_thread_lives(
    engine: Engine, runner: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise ZeroDivisionError("a bug")

    step = runner.step
    monkeypatch.setattr(runner, "step", crash)
    sink = _Waiting()
    engine.submit(runner, _request(), sink)
    assert isinstance(sink.wait().error, BackendError)
    monkeypatch.setattr(runner, "step", step)
    again = _Waiting()
    engine.submit(runner, _request(), again)
    assert_greedy(llama, PROMPT, again.wait().tokens(), 8)


def test_a_message_that_raises_does_not_stop_the_thread(engine: Engine) -> None:
    engine.post(lambda: 1 // 0 and None)
    assert engine.call(lambda: 5).result(PATIENCE_S) == 5


def test_call_hands_back_the_exception(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0).result(PATIENCE_S)


def test_events_are_followed_by_after_step(llama: Path, engine: Engine, runner: Runner) -> None:
    sink = _Waiting()
    flushed: list[int] = []
    engine.after_step = lambda: flushed.append(len(sink.batches))
    engine.submit(runner, _request(), sink)
    sink.wait()
    engine.call(lambda: None).result(PATIENCE_S)
    assert set(range(1, 9)) <= set(flushed)  # after each of the eight deliveries
