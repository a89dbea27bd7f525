"""Answers while a verdict is on its way, and when none comes: the guard is a script, the rest is real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from guards import Turn, Verdict
from serving.refusals import CARING, REFUSAL
from serving.routes import chat
from serving.screening import Screen
from serving.service import Service
from tests.serving.guarded import BAD, GOOD, SAFE, UNSAFE, WORD, client_of, failing, said, serving_here
from tests.serving.server import START_S, wait_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# The model is noise, and may end its answer at any token.
ON: dict[str, Any] = {"ignore_eos": True}
ENDLESS: dict[str, Any] = {"max_tokens": 400, **ON}


class Court:
    """Judges when it is told to; whoever wants to know can ask how far it is."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.verdict: Verdict | None = None
        self.ended = threading.Event()

    def __call__(self, turns: Sequence[Turn]) -> Generator[None, None, Verdict]:
        self.asked.set()
        try:
            while self.verdict is None:
                time.sleep(0.001)
                yield
            return self.verdict
        finally:
            self.ended.set()


@pytest.fixture
def court() -> Court:
    return Court()


def running(service: Service) -> int:
    return sum(loaded.runner.running + loaded.runner.waiting for loaded in service.models.loaded())


def drawn(service: Service) -> int:
    """Tokens that the engine has drawn so far."""
    return sum(loaded.runner.speculator.snapshot().tokens for loaded in service.models.loaded())


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_engine_works_while_the_guard_judges_and_nothing_is_sent(court: Court, tiny_model: Path, path: str) -> None:
    body = {"messages": said(GOOD)} if path == CHAT else {"prompt": GOOD}
    with serving_here(tiny_model, court) as (service, url), httpx.Client(timeout=START_S) as http:
        answer: list[httpx.Response] = []
        ask = threading.Thread(target=lambda: answer.append(http.post(url + path, json={**body, **ENDLESS})))
        ask.start()
        wait_until(lambda: drawn(service) > 5, "the engine has begun to answer")
        assert not court.ended.is_set()
        court.verdict = UNSAFE
        ask.join(START_S)
        choice = answer[0].json()["choices"][0]
        assert choice["finish_reason"] == "content_filter"
        assert (choice["message"]["content"] if path == CHAT else choice["text"]) == REFUSAL
        wait_until(lambda: running(service) == 0, "the engine has let it be")


def test_a_stream_begins_once_the_prompt_is_found_safe(court: Court, tiny_model: Path) -> None:
    with serving_here(tiny_model, court) as (service, url), httpx.Client(timeout=START_S) as http:
        body = {"messages": said(GOOD), "stream": True, **ENDLESS}
        with pytest.raises(httpx.ReadTimeout):
            http.post(url + CHAT, json=body, timeout=httpx.Timeout(START_S, read=0.5))
        assert court.ended.wait(START_S)  # the client has gone: so does the judging
        wait_until(lambda: running(service) == 0, "the engine has let it be")
        court.verdict = SAFE
        with http.stream(
            "POST", url + CHAT, json={"messages": said(GOOD), "stream": True, "max_tokens": 3, **ON}
        ) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_annotating_waits_only_at_the_end(court: Court, tiny_model: Path) -> None:
    body = {"messages": said(GOOD), "stream": True, "max_tokens": 100, **ON}
    with serving_here(tiny_model, court, guard="annotate") as (_, url), httpx.Client(timeout=START_S) as http:
        with http.stream("POST", url + CHAT, json=body) as answer:
            lines = (line for line in answer.iter_lines() if line)
            first = json.loads(next(lines).removeprefix("data: "))
            assert first["choices"][0]["delta"]["role"] == "assistant"
            assert court.verdict is None
            court.verdict = UNSAFE
            rest = list(lines)
        assert json.loads(rest[-2].removeprefix("data: "))["x_guard"]["score"] == UNSAFE.score


def test_a_verdict_before_the_engine_is_asked(court: Court, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    court.verdict = UNSAFE
    prepare, screening, screens = chat.prepare_chat, chat.screening, []

    @contextlib.contextmanager
    def seen(*arguments: Any) -> Iterator[list[Screen]]:
        with screening(*arguments) as made:
            screens.extend(made)
            yield made

    async def slow(*arguments: Any) -> Any:
        job = await prepare(*arguments)
        while not screens[0].has_refused:
            await asyncio.sleep(0.001)
        return job

    monkeypatch.setattr(chat, "screening", seen)
    monkeypatch.setattr(chat, "prepare_chat", slow)
    with serving_here(tiny_model, court) as (service, url), client_of(url) as client:
        monkeypatch.setattr(service.engine, "submit", None)
        answer = client.chat.completions.create(model="tiny", messages=said(GOOD))
    assert answer.choices[0].finish_reason == "content_filter"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0


def test_a_faulty_request_leaves_no_judging_behind(court: Court, tiny_model: Path) -> None:
    with serving_here(tiny_model, court) as (service, url), httpx.Client(timeout=START_S) as http:
        for path, body in ((CHAT, {"messages": said(GOOD)}), (TEXT, {"prompt": GOOD})):
            answer = http.post(url + path, json={**body, "logit_bias": {"9999999": 1}})
            assert answer.status_code == 400
        assert not court.asked.is_set() or court.ended.wait(START_S)
        assert running(service) == 0


def test_a_verdict_that_takes_too_long_is_a_timeout(court: Court, tiny_model: Path) -> None:
    with serving_here(tiny_model, court) as (service, url), httpx.Client(timeout=START_S) as http:
        for path, body in ((CHAT, {"messages": said(GOOD)}), (TEXT, {"prompt": GOOD})):
            answer = http.post(url + path, json={**body, "max_tokens": 2, "timeout": 0.3})
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
        assert court.ended.wait(START_S)
        wait_until(lambda: running(service) == 0, "the engine has let it be")


@pytest.fixture(scope="module", params=["closed", "open"])
def broken(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[tuple[str, str, Service]]:
    """A server whose guard fails on the word: what it does then, and where it is."""
    with serving_here(tiny_model, failing, guard_on_error=request.param) as (service, url):
        yield request.param, url, service


def test_a_guard_that_fails_closed_refuses_and_open_lets_pass(
    broken: tuple[str, str, Service], caplog: pytest.LogCaptureFixture
) -> None:
    policy, url, service = broken
    registry = service.metrics.registry
    before = registry.get_sample_value("edgellm_guard_errors_total")
    with client_of(url) as client:
        answer = client.chat.completions.create(model="tiny", messages=said(BAD), max_tokens=2, extra_body=ON)
        texts = client.completions.create(model="tiny", prompt=[BAD, GOOD], max_tokens=2)
    assert registry.get_sample_value("edgellm_guard_errors_total") == (before or 0) + 2
    assert sum(record.exc_info is not None for record in caplog.records) == 2
    reasons = [answer.choices[0].finish_reason, *(choice.finish_reason for choice in texts.choices)]
    if policy == "open":
        assert "content_filter" not in reasons
        assert not hasattr(answer, "x_guard")
    else:
        assert [reason == "content_filter" for reason in reasons] == [True, True, False]
        assert answer.choices[0].message.content == REFUSAL
        found = answer.x_guard  # type: ignore[attr-defined]
        assert (found["label"], found["score"]) == (None, None)
        assert "failed" in found["error"]


def test_a_guard_that_fails_is_told_where_answers_are_annotated(tiny_model: Path) -> None:
    with serving_here(tiny_model, failing, guard="annotate") as (_, url), client_of(url) as client:
        answer: Any = client.chat.completions.create(model="tiny", messages=said(BAD), max_tokens=2, extra_body=ON)
        assert answer.choices[0].finish_reason == "length"
        assert "failed" in answer.x_guard["error"]
        assert answer.x_guard["label"] is None


def test_a_guard_that_fails_fails_a_moderation(broken: tuple[str, str, Service]) -> None:
    _, url, _ = broken
    with client_of(url) as client, pytest.raises(openai.InternalServerError) as caught:
        client.moderations.create(input=[GOOD, BAD])
    assert caught.value.code == "guard_failed"
    assert WORD not in str(caught.value)


def test_prompts_of_token_ids_are_read_as_text(tiny_model: Path) -> None:
    rules = {"guard_block": (WORD,), "guard_allow": ("re:.+",)}
    with serving_here(tiny_model, **rules) as (service, url), client_of(url) as client:
        [loaded] = service.models.loaded()
        prompts = [loaded.vocab.tokenize(text, add_special=False, parse_special=True) for text in (GOOD, BAD)]
        answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=2, echo=True, extra_body=ON)
        [one] = client.completions.create(model="tiny", prompt=prompts[1], max_tokens=2).choices
    assert [choice.finish_reason for choice in answer.choices] == ["length", "content_filter"]
    assert [choice.text.startswith(text) for choice, text in zip(answer.choices, (GOOD, BAD), strict=True)] == [
        True
    ] * 2
    assert (one.text, one.finish_reason) == (REFUSAL, "content_filter")


@pytest.mark.parametrize("stream", [False, True])
def test_who_may_be_in_need_is_told_where_help_is(tiny_model: Path, stream: bool) -> None:
    def judging(turns: Sequence[Turn]) -> Generator[None, None, Verdict]:
        yield
        return replace(UNSAFE, categories={"self_harm": 0.5 * UNSAFE.score})

    with serving_here(tiny_model, judging) as (_, url), client_of(url) as client:
        if stream:
            chunks = client.chat.completions.create(model="tiny", messages=said(BAD), stream=True)
            texts = ["".join(chunk.choices[0].delta.content or "" for chunk in chunks)]
        else:
            texts = [client.chat.completions.create(model="tiny", messages=said(BAD)).choices[0].message.content]
        texts += [choice.text for choice in client.completions.create(model="tiny", prompt=[BAD, GOOD]).choices]
        assert texts == [CARING] * 3
