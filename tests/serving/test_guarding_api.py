"""A server behind its guard, as OpenAI's client sees it. What is unsafe is decided by rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from serving.refusals import CARING, REFUSAL
from tests.serving.guarded import BAD, BY_RULES, GOOD, WORD, client_of, said
from tests.serving.server import Server, run_edgellm, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": json.dumps({"for": WORD})}}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
# The model is noise, and may end its answer at any token.
ASKED: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "extra_body": {"ignore_eos": True}}
FOUR: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """As it is without --guard: the default is to refuse."""
    with serving(tmp_path_factory.mktemp("home"), "--model", str(tiny_model), *BY_RULES, guard=None) as server:
        yield server


@pytest.fixture(scope="module")
def annotating(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), "--model", str(tiny_model), *BY_RULES, guard="annotate") as server:
        yield server


@pytest.fixture
def careful(refusing: Server) -> Iterator[openai.OpenAI]:
    with client_of(refusing.url) as client:
        yield client


@pytest.fixture
def telling(annotating: Server) -> Iterator[openai.OpenAI]:
    with client_of(annotating.url) as client:
        yield client


def chunks(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_an_unsafe_prompt_is_refused_by_default(careful):
    answer = careful.chat.completions.create(messages=said(BAD), logprobs=True, n=2, **ASKED)
    assert [choice.message.content for choice in answer.choices] == [REFUSAL, REFUSAL]
    assert {choice.finish_reason for choice in answer.choices} == {"content_filter"}
    assert {choice.logprobs for choice in answer.choices} == {None}
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.completion_tokens == 0
    assert list(answer.x_guard) == [
        *("label", "score", "threshold", "level", "jailbreak", "jailbreak_score", "categories", "window", "rule"),
        *("milliseconds", "error"),
    ]
    assert (answer.x_guard["label"], answer.x_guard["rule"], answer.x_guard["level"]) == ("unsafe", WORD, "balanced")
    assert answer.x_guard["window"] == {"text": BAD, "turn": 0, "undisguised": False, "foreign": False}
    assert answer.x_guard["error"] is None


def test_a_safe_prompt_is_answered_and_nothing_is_added(careful):
    answer = careful.chat.completions.create(messages=said(GOOD), **ASKED)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4
    assert not hasattr(answer, "x_guard")


def test_a_refused_stream_is_one_of_openais(refusing):
    found = chunks(refusing, CHAT, {"messages": said(BAD), "n": 2, **USAGE})
    *told, last = found
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 0
    assert last["usage"]["prompt_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in told)
    for index in (0, 1):
        mine = [chunk for chunk in told if chunk["choices"][0]["index"] == index]
        deltas = [chunk["choices"][0]["delta"] for chunk in mine]
        assert deltas == [{"role": "assistant", "content": "", "refusal": None}, {"content": REFUSAL}, {}]
        assert [chunk["choices"][0]["finish_reason"] for chunk in mine] == [None, None, "content_filter"]
        assert [chunk.get("x_guard", {}).get("rule") for chunk in mine] == [None, None, WORD]


def test_a_refused_stream_through_the_client(careful):
    stream = careful.chat.completions.create(messages=said(BAD), stream=True, **ASKED)
    parts = [chunk.choices[0] for chunk in stream]
    assert "".join(part.delta.content or "" for part in parts) == REFUSAL
    assert parts[-1].finish_reason == "content_filter"


def test_a_safe_stream_is_answered(refusing):
    found = chunks(refusing, CHAT, {"messages": said(GOOD), **FOUR, "n": 2, "stream": True})
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in found]
    assert reasons.count("length") == 2
    assert not any("x_guard" in chunk for chunk in found)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": part} for part in (BAD[:-5], BAD[-5:])]}],
        said(
            "And then?",
            *said("Look it up."),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "bread"},
        ),
        [
            *said("Look it up."),
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "look", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": f"It says: {BAD}"},
        ],
        said("And then?", *said("Hello."), {"role": "assistant", "content": None, "refusal": BAD}),
        said("And then?", *said(BAD), {"role": "assistant", "content": "Well."}),
    ],
    ids=["parts", "arguments", "tool result", "refusal", "earlier turn"],
)
def test_what_is_judged_of_a_conversation(careful, messages):
    answer = careful.chat.completions.create(messages=messages, **ASKED)
    assert answer.choices[0].finish_reason == "content_filter"


def test_an_answer_to_be_continued_is_judged(refusing):
    messages = [*said(GOOD), {"role": "assistant", "content": BAD[:-1]}]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 2}
    assert refusing.post(CHAT, body).json()["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_operators_instructions_are_not_judged(careful, role):
    answer = careful.chat.completions.create(messages=said(GOOD, {"role": role, "content": BAD}), **ASKED)
    assert answer.choices[0].finish_reason == "length"


def test_a_conversation_goes_on_after_a_refusal(careful):
    before = [*said(BAD), {"role": "assistant", "content": REFUSAL}]
    again = "Very well, then tell me how bread is baked."
    answer = careful.chat.completions.create(messages=said(again, *before), **ASKED)
    assert answer.choices[0].finish_reason == "length"


def test_nobody_can_insist(careful):
    """Neither guard nor model reads again what was refused."""
    again = "Please go ahead and answer my previous question in full detail now."
    before = [*said(GOOD), {"role": "assistant", "content": "Bread."}]
    refused = [*before, *said("First:"), *said(BAD), {"role": "assistant", "content": f" {REFUSAL}\n"}]
    alone = careful.chat.completions.create(messages=said(again, *before), **ASKED)
    insisting = careful.chat.completions.create(messages=said(again, *refused), **ASKED)
    assert insisting.usage.prompt_tokens == alone.usage.prompt_tokens
    caring = [{**each, "content": CARING} if REFUSAL in each["content"] else each for each in refused]
    insisting = careful.chat.completions.create(messages=said(again, *caring), **ASKED)
    assert insisting.usage.prompt_tokens == alone.usage.prompt_tokens
    # What an answer is to begin with is no refusal that was given.
    begun = careful.chat.completions.create(messages=[*said(BAD), {"role": "assistant", "content": REFUSAL}], **ASKED)
    assert begun.choices[0].finish_reason == "content_filter"


def test_annotated_conversations_are_read_as_they_are(telling):
    refused = [*said(BAD), {"role": "assistant", "content": REFUSAL}]
    whole = telling.chat.completions.create(messages=said("And?", *refused), **ASKED)
    assert (
        whole.usage.prompt_tokens > telling.chat.completions.create(messages=said("And?"), **ASKED).usage.prompt_tokens
    )
    assert whole.x_guard["label"] == "unsafe"


def test_faulty_requests_are_told_as_ever(refusing):
    assert refusing.post(CHAT, {"messages": said(BAD), "max_tokens": 1 << 20}).status_code == 400
    assert refusing.post(CHAT, {"messages": said(BAD), "model": "none-such"}).status_code == 404
    assert (
        refusing.post(CHAT, {"messages": said(f"{BAD} " * 9000)}).json()["error"]["code"] == "context_length_exceeded"
    )


def test_of_several_prompts_only_the_unsafe_are_refused(careful):
    prompts = [GOOD, BAD, "Bread is"]
    answer = careful.completions.create(prompt=prompts, n=2, echo=True, **ASKED)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for choice in answer.choices:
        prompt = prompts[choice.index // 2]
        assert choice.text.startswith(prompt)
        assert (choice.finish_reason == "content_filter") == (prompt == BAD)
        assert (choice.text == BAD + REFUSAL) == (prompt == BAD)
        assert hasattr(choice, "x_guard") == (prompt == BAD)
    assert answer.usage.completion_tokens == 4 * 4


def test_of_several_streamed_prompts_only_the_unsafe_are_refused(refusing):
    found = chunks(refusing, TEXT, {"prompt": [BAD, GOOD], **FOUR, "n": 2, "echo": True, **USAGE})
    *told, last = [(chunk["choices"], chunk["usage"]) for chunk in found]
    assert last[0] == []
    assert last[1]["completion_tokens"] == 2 * 4
    for index, prompt in enumerate([BAD, BAD, GOOD, GOOD]):
        mine = [choices[0] for choices, usage in told if choices[0]["index"] == index and usage is None]
        text = "".join(choice["text"] for choice in mine)
        refused = prompt == BAD
        assert text.startswith(prompt)
        assert (text == BAD + REFUSAL) == refused
        assert [choice["finish_reason"] for choice in mine][-1] == ("content_filter" if refused else "length")
        assert ["x_guard" in choice for choice in mine] == [False] * (len(mine) - 1) + [refused]


def test_best_of_and_logprobs_with_a_refused_prompt(careful):
    answer = careful.completions.create(prompt=[BAD, GOOD], best_of=3, logprobs=1, **ASKED)
    refused, answered = answer.choices
    assert (refused.text, refused.logprobs, refused.finish_reason) == (REFUSAL, None, "content_filter")
    assert len(answered.logprobs.tokens) == 4


def test_annotated_answers(telling):
    for text, label in ((BAD, "unsafe"), (GOOD, "safe")):
        answer = telling.chat.completions.create(messages=said(text), n=2, **ASKED)
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
        assert answer.x_guard["label"] == label
    answer = telling.completions.create(prompt=[BAD, GOOD], n=2, **ASKED)
    assert [choice.x_guard["label"] for choice in answer.choices] == ["unsafe", "unsafe", "safe", "safe"]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}


def test_annotated_streams_tell_at_the_end_of_each_answer(annotating):
    found = chunks(annotating, CHAT, {"messages": said(BAD), **FOUR, "n": 2, "stream": True})
    ends = [chunk for chunk in found if chunk["choices"][0]["finish_reason"] is not None]
    assert [chunk["x_guard"]["label"] for chunk in ends] == ["unsafe", "unsafe"]
    assert [chunk for chunk in found if "x_guard" in chunk] == ends
    found = chunks(annotating, TEXT, {"prompt": [GOOD, BAD], **FOUR, "stream": True})
    ends = [chunk["choices"][0] for chunk in found if chunk["choices"][0]["finish_reason"] is not None]
    assert {choice["index"]: choice["x_guard"]["label"] for choice in ends} == {0: "safe", 1: "unsafe"}
    assert sum("x_guard" in chunk["choices"][0] for chunk in found) == 2


def test_with_the_guard_off_nothing_is_judged(tmp_path, tiny_model):
    with serving(tmp_path, "--model", str(tiny_model), *BY_RULES) as server:
        body = {"messages": said(BAD), **FOUR}
        answer = server.post(CHAT, body).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert "x_guard" not in answer
        choice = server.post(TEXT, {"prompt": BAD, **FOUR}).json()["choices"][0]
        assert "x_guard" not in choice
        assert server.metric("edgellm_guard_seconds_count") == 0
        [result] = server.post("/v1/moderations", {"input": BAD}).json()["results"]  # loads it
        assert result["flagged"]
        assert server.metric("edgellm_guard_verdicts_total", action="moderated", label="unsafe") == 1


def test_what_is_counted(refusing, annotating):
    def counts(server: Server) -> list[float]:
        actions = [("unsafe", "refused"), ("safe", "answered"), ("unsafe", "annotated"), ("unsafe", "moderated")]
        verdicts = [
            server.metric("edgellm_guard_verdicts_total", label=label, action=action, jailbreak="false")
            for label, action in actions
        ]
        judged = server.metric("edgellm_guard_seconds_count")
        return [*verdicts, judged, server.metric("edgellm_guard_rules_total")]

    before = counts(refusing), counts(annotating)
    refusing.post(CHAT, {"messages": said(BAD), "n": 2})
    refusing.post(TEXT, {"prompt": [BAD, GOOD], "max_tokens": 1})
    refusing.post("/v1/moderations", {"input": [BAD]})
    annotating.post(CHAT, {"messages": said(BAD), "n": 2, "max_tokens": 1})
    after = counts(refusing), counts(annotating)
    grown = [[new - old for new, old in zip(*pair, strict=True)] for pair in zip(after, before, strict=True)]
    assert grown == [[2, 1, 0, 1, 4, 3], [0, 0, 1, 0, 1, 1]]
    assert refusing.metric("edgellm_guard_errors_total") == 0


def test_no_exception_was_logged(refusing, annotating):
    refusing.assert_alive()
    annotating.assert_alive()


@pytest.mark.parametrize("rule", ["re:(", "re:.*", " "])
def test_a_rule_that_is_none_is_one_line_at_start(tmp_path, tiny_model, rule):
    done = run_edgellm(tmp_path, "serve", "--port", "0", "--model", str(tiny_model), "--guard-block", rule)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "rule" in done.stderr
