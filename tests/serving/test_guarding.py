"""The guard's thread, the policy on verdicts, what is judged of a request, and the settings; without a server."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from pydantic import TypeAdapter

from edgellm.config import Settings, load_settings
from edgellm.errors import ConfigError, ShuttingDownError
from guards import Guard, Turn, Verdict
from serving.guard_metrics import GuardMetrics
from serving.guard_turns import chat_turns, is_short, prompt_turns
from serving.guarding import Guarding, let_go
from serving.screening import is_refused, screening
from serving.wire.guard import GuardReport
from serving.wire.messages import Message
from tests.serving.guarded import SAFE, UNSAFE, Judging, ScriptedGuard, failing

PATIENCE_S = 30


def guarding(judging: Judging, **settings: Any) -> Guarding:
    made = Settings(**settings)
    return Guarding(made, GuardMetrics(CollectorRegistry()), lambda rules: ScriptedGuard(judging))


def turns(text: str) -> list[Turn]:
    return [Turn("user", text)]


def test_a_long_text_does_not_hold_up_a_short_one() -> None:
    order, handed_in = [], threading.Event()

    def judging(turns: Sequence[Turn]) -> Generator[None, None, Verdict]:
        text = turns[0].text
        if text == "long":
            assert handed_in.wait(PATIENCE_S)
        for _ in range(100 if text == "long" else 2):
            yield
        order.append(text)
        return SAFE

    async def scene() -> None:
        guard = guarding(judging)
        results = [guard.judge(turns(text)) for text in ("long", "short")]
        handed_in.set()
        assert await asyncio.gather(*results) == [SAFE, SAFE]
        guard.close()

    asyncio.run(scene())
    assert order == ["short", "long"]


def test_one_thread_judges_all() -> None:
    threads = set()

    def judging(turns: Sequence[Turn]) -> Generator[None, None, Verdict]:
        threads.add(threading.current_thread())
        yield
        return SAFE

    async def scene() -> None:
        guard = guarding(judging)
        await asyncio.gather(*(guard.judge(turns(str(number))) for number in range(20)))
        guard.close()

    asyncio.run(scene())
    [thread] = threads
    assert thread.name == "edgellm-guard"
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_what_nobody_waits_for_is_dropped() -> None:
    begun, ended = threading.Semaphore(0), threading.Semaphore(0)

    def judging(turns: Sequence[Turn]) -> Generator[None, None, Verdict]:
        begun.release()
        try:
            while True:
                yield
        finally:
            ended.release()

    async def scene() -> None:
        guard = guarding(judging)
        result = guard.judge(turns("a"))
        with screening(guard) as (screen,):
            screen.begin(turns("b"))
            for _ in range(2):
                assert await asyncio.to_thread(begun.acquire, timeout=PATIENCE_S)
        let_go(result)
        for _ in range(2):
            assert await asyncio.to_thread(ended.acquire, timeout=PATIENCE_S)
        guard.close()

    asyncio.run(scene())


def test_a_failure_is_logged_counted_and_concerns_one_text(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()

    async def scene() -> None:
        guard = Guarding(Settings(), GuardMetrics(registry), lambda rules: ScriptedGuard(failing))
        results = [guard.judge(turns(text)) for text in ("zorkmid", "bread", "zorkmid")]
        assert await asyncio.gather(*results) == [None, SAFE, None]
        guard.close()

    asyncio.run(scene())
    assert [record.exc_info is not None for record in caplog.records] == [True, True]
    assert "zorkmid" not in caplog.text
    assert registry.get_sample_value("edgellm_guard_errors_total") == 2
    assert registry.get_sample_value("edgellm_guard_seconds_count") == 1


def test_who_waits_is_told_of_the_end() -> None:
    def judging(turns: Sequence[Turn]) -> Generator[None, None, Verdict]:
        while True:
            yield

    async def scene() -> None:
        guard = guarding(judging)
        waited, unheeded = guard.judge(turns("a")), guard.judge(turns("b"))
        guard.close()
        guard.close()
        with pytest.raises(ShuttingDownError):
            await waited
        await asyncio.sleep(0)
        let_go(unheeded)
        with pytest.raises(ShuttingDownError):
            guard.judge(turns("c"))

    asyncio.run(scene())
    gc.collect()  # a warning of asyncio's would be an error


def test_the_guard_is_made_when_it_is_needed_and_tried_again_if_it_cannot_be() -> None:
    tries = itertools.count()

    def make(rules: object) -> Guard:
        if not next(tries):
            raise OSError("no file")
        return ScriptedGuard(failing)

    async def scene() -> None:
        guard = Guarding(Settings(guard="off"), GuardMetrics(CollectorRegistry()), make)
        assert await guard.judge(turns("a")) is None
        assert await guard.judge(turns("a")) == SAFE
        assert guard.version == "scripted"
        guard.close()

    asyncio.run(scene())
    assert next(tries) == 2


def test_files_that_are_missing_are_one_line(tmp_path: Path) -> None:
    made = Guarding(Settings(), GuardMetrics(CollectorRegistry()), lambda rules: Guard(rules=rules, folder=tmp_path))
    with pytest.raises(ConfigError, match=r"card\.json"):
        made.load()


def test_the_guard_that_comes_with_it_knows_the_rules_and_the_level() -> None:
    async def scene() -> list[Verdict | None]:
        settings = Settings(guard_level="strict", guard_block=("zorkmid",), guard_allow=("re:.+",))
        guard = Guarding(settings, GuardMetrics(CollectorRegistry()))
        threshold = guard.load().card.thresholds["strict"]
        found = await asyncio.gather(*(guard.judge(turns(text)) for text in ("A zorkmid", "Bread")))
        assert [verdict is not None and verdict.threshold for verdict in found] == [threshold, threshold]
        guard.close()
        return found

    blocked, allowed = asyncio.run(scene())
    assert blocked is not None
    assert (blocked.label, blocked.rule) == ("unsafe", "zorkmid")
    assert allowed is not None
    assert (allowed.label, allowed.score) == ("safe", 0.0)


@pytest.mark.parametrize(
    ("guard", "on_error", "judged", "refused"),
    [
        ("refuse", "closed", SAFE, False),
        ("refuse", "closed", UNSAFE, True),
        ("refuse", "closed", None, True),
        ("refuse", "open", UNSAFE, True),
        ("refuse", "open", None, False),
        ("annotate", "closed", UNSAFE, False),
        ("annotate", "closed", None, False),
        ("off", "closed", UNSAFE, False),
    ],
)
def test_the_policy(guard: Any, on_error: Any, judged: Verdict | None, refused: bool) -> None:
    assert is_refused(guard, on_error, judged) is refused


def test_a_report_of_a_failure_is_null_but_for_the_error() -> None:
    report = GuardReport.of(None, "strict").model_dump()
    assert report.pop("level") == "strict"
    assert "log" in report.pop("error")
    assert set(report.values()) == {None}
    assert (
        GuardReport.of(UNSAFE, "strict")
        .to_json()
        .endswith(b'"window":null,"rule":null,"milliseconds":2.0,"error":null}')
    )


def test_messages_are_turns() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    parts = [{"type": "text", "text": "on"}, {"type": "text", "text": "e"}]
    messages = TypeAdapter(list[Message]).validate_python(
        [
            {"role": "system", "content": "s"},
            {"role": "developer", "content": parts},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "x", "refusal": "y", "tool_calls": [call, call]},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "tool", "content": "t", "tool_call_id": "c"},
        ]
    )
    called = 'look\n{"a": 1}'
    assert chat_turns(messages) == [
        Turn("system", "s"),
        Turn("developer", "one"),
        Turn("user", "one"),
        Turn("assistant", f"x\ny\n{called}\n{called}"),
        Turn("assistant", "no"),
        Turn("tool", "t"),
    ]


def test_prompts_are_turns() -> None:
    assert prompt_turns("a") == turns("a")
    assert prompt_turns("def f(", "): pass") == turns("def f(\n): pass")


def test_long_conversations_wait_until_they_are_known_to_fit() -> None:
    assert is_short(turns("a" * 60_000))
    assert not is_short(turns("a" * 40_000) * 2)


def test_the_default_is_to_refuse() -> None:
    settings = load_settings()
    assert (settings.guard, settings.guard_level, settings.guard_on_error) == ("refuse", "balanced", "closed")
    assert settings.guard_allow == settings.guard_block == ()


def test_rules_are_not_split_at_commas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rules = ("re:a{1,2}", "b, c")
    assert load_settings(guard_block=rules).guard_block == rules
    monkeypatch.setenv("EDGELLM_GUARD_BLOCK", "\n".join([rules[0], "", rules[1]]))
    assert load_settings().guard_block == rules
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text(f"guard_allow = ['{rules[0]}', '{rules[1]}']\n")
    assert load_settings().guard_allow == rules


@pytest.mark.parametrize("fields", [{"guard": "on"}, {"guard_level": "0.5"}, {"guard_on_error": "ajar"}])
def test_other_values_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        load_settings(**fields)
