"""POST /v1/chat/completions as OpenAI's client sees it, on the bundled model."""

from __future__ import annotations

import asyncio
import json
import math

import httpx
import openai
import pytest

from tests.serving.server import START_S, Server

MODEL = "smollm2-135m-instruct"
HELLO = [{"role": "user", "content": "Say hello in one short sentence."}]
COUNT = [{"role": "user", "content": "Count from one to twenty, separated by commas."}]


def test_a_plain_answer_has_openais_shape(client):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    [choice] = answer.choices
    assert choice.index == 0
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.message.tool_calls is None
    assert choice.logprobs is None
    assert choice.finish_reason in {"stop", "length"}
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 8


def test_max_tokens_ends_the_answer_with_length(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model=MODEL, messages=COUNT, temperature=0, **{name: 5})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 5


def test_a_stream_sends_the_role_first_the_reason_last_and_done(smol):
    body = {"messages": HELLO, "max_tokens": 6, "temperature": 0, "stream": True}
    answer = smol.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert set(reasons[:-1]) == {None}
    assert reasons[-1] in {"stop", "length"}
    assert all("usage" not in chunk for chunk in chunks)


def test_a_stream_says_what_the_whole_answer_says(client):
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


async def _ask(client: openai.AsyncOpenAI) -> tuple[str, str]:
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 8, "temperature": 0}
    whole = await client.chat.completions.create(**asked)
    parts = [
        chunk.choices[0].delta.content or ""
        async for chunk in await client.chat.completions.create(stream=True, **asked)
    ]
    return whole.choices[0].message.content, "".join(parts)


def test_the_async_client_gets_the_same(smol: Server):
    async def run() -> tuple[str, str]:
        async with (
            httpx.AsyncClient() as http,
            openai.AsyncOpenAI(
                base_url=smol.api, api_key="unused", max_retries=0, timeout=START_S, http_client=http
            ) as client,
        ):
            return await _ask(client)

    whole, streamed = asyncio.run(run())
    assert whole == streamed != ""


def test_several_answers_differ_and_share_the_prompt(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=12, temperature=2, n=2, seed=5, logprobs=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    first, second = (choice.message.content for choice in answer.choices)
    assert first != second  # the same 12 tokens twice at temperature 2: less than one in a million
    one = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens


def test_streamed_answers_carry_their_index(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=6, temperature=1, n=2, seed=5, stream=True
    )
    roles, reasons = {}, {}
    for chunk in stream:
        [choice] = chunk.choices
        assert choice.index not in reasons
        if choice.delta.role:
            assert choice.index not in roles
            roles[choice.index] = choice.delta.role
        assert choice.index in roles
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert roles == {0: "assistant", 1: "assistant"}
    assert set(reasons) == {0, 1}


def test_a_stop_string_across_tokens_ends_the_answer_before_it(client):
    asked = {"model": MODEL, "messages": COUNT, "max_tokens": 24, "temperature": 0}
    free = client.chat.completions.create(logprobs=True, **asked).choices[0]
    text, tokens = free.message.content, [item.token for item in free.logprobs.content]
    joined = next(i for i in range(4, len(tokens) - 1) if tokens[i] + tokens[i + 1] in text)  # no half characters
    stop = tokens[joined][-1:] + tokens[joined + 1][:2]  # begins in one token and ends in the next
    for wanted in (stop, ["never said", stop]):
        cut = client.chat.completions.create(stop=wanted, **asked).choices[0]
        assert cut.finish_reason == "stop"
        assert cut.message.content == text[: text.index(stop)]
    stream = client.chat.completions.create(stop=stop, stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text[: text.index(stop)]


def test_an_answer_that_a_stop_string_ends_tells_what_came_from_the_cache(client):
    asked = {"model": MODEL, "messages": COUNT, "max_tokens": 24, "temperature": 0}
    text = client.chat.completions.create(**asked).choices[0].message.content
    usage = client.chat.completions.create(stop=text[3:6], **asked).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_logprobs_are_sound(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    spoken = b""
    for item in choice.logprobs.content:
        assert len(item.top_logprobs) == 3
        values = [top.logprob for top in item.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1 + 1e-3
        assert (item.token, item.bytes) == (item.top_logprobs[0].token, item.top_logprobs[0].bytes)  # greedy
        assert item.logprob == pytest.approx(values[0], abs=1e-4)
        spoken += bytes(item.bytes)
    assert spoken.decode().startswith(choice.message.content)


def test_streamed_logprobs_are_those_of_the_whole_answer(client):
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    stream = client.chat.completions.create(stream=True, **asked)
    streamed = [item for chunk in stream if chunk.choices[0].logprobs for item in chunk.choices[0].logprobs.content]
    assert [item.token for item in streamed] == [item.token for item in whole]
    assert [item.logprob for item in streamed] == pytest.approx([item.logprob for item in whole], abs=0.05)


def test_a_seed_makes_an_answer_repeatable(client):
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 1.5}
    texts = [client.chat.completions.create(seed=seed, **asked).choices[0].message.content for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_0_is_repeatable_whatever_the_seed(client):
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    texts = {client.chat.completions.create(seed=seed, **asked).choices[0].message.content for seed in (1, 2, 3)}
    assert len(texts) == 1


def test_a_large_bias_forces_a_token(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=3, temperature=0, logprobs=True, logit_bias={"100": 100}
    )
    assert len({item.token for item in answer.choices[0].logprobs.content}) == 1


def test_every_role_is_understood(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "developer", "content": [{"type": "text", "text": "Answer in English."}]},
        {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "warm in Bern?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "31 degrees"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "How warm?", "name": "Ann"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4)
    short = client.chat.completions.create(model=MODEL, messages=messages[:1] + messages[-1:], max_tokens=4)
    assert answer.usage.prompt_tokens > short.usage.prompt_tokens


def test_the_second_identical_request_finds_its_prompt_cached(client):
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me of the otters of " * 12}]}
    first, second = (client.chat.completions.create(max_tokens=1, **asked).usage for _ in range(2))
    assert first.prompt_tokens == second.prompt_tokens
    assert second.prompt_tokens_details.cached_tokens > first.prompt_tokens_details.cached_tokens
    assert second.prompt_tokens_details.cached_tokens == second.prompt_tokens - 1  # the last one has to be computed


def test_characters_of_many_bytes_are_never_broken_in_a_stream(client):
    wanted = "жизнь — 日本語 🦦👩‍👩‍👧 é"
    stream = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=80,
        stream=True,
        extra_body={"grammar": f'root ::= "{wanted}"'},
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == wanted
    assert len([part for part in parts if part]) > 5
    assert all("\ufffd" not in part for part in parts)


def test_continuing_the_last_message_and_unknown_fields(client):
    messages = [*HELLO, {"role": "assistant", "content": "The capital of France is"}]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=2,
        temperature=0,
        extra_body={"continue_final_message": True, "no_such_field": [1, 2]},
    )
    assert "Paris" in answer.choices[0].message.content


def test_ignore_eos_runs_to_the_limit(tiny_client):
    answer = tiny_client.chat.completions.create(
        model="", messages=HELLO, max_tokens=200, extra_body={"ignore_eos": True, "top_k": 5, "min_p": 0.01}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 200
