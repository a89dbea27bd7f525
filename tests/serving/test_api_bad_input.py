"""Bad requests to a real server: a 4xx in OpenAI's envelope that says what is wrong, and the server answers on."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.serving.server import Server

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
USER = [{"role": "user", "content": "hi"}]


def check_error(answer: Any, status: int, code: str | None = None) -> dict[str, Any]:
    """The envelope's inside, after a look at its shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in error["message"]
    if code is not None:
        assert error["code"] == code, error
    return error


@pytest.fixture(autouse=True)
def _alive_afterwards(tiny: Server):
    yield
    tiny.assert_alive()
    answer = tiny.post(CHAT, {"messages": USER, "max_tokens": 2})
    assert answer.status_code == 200, answer.text


FAULTY_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages"),
    "messages is text": ({"messages": "hi"}, "messages"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0]"),
    "content is a number": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
    ),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens negative": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens huge": ({"max_tokens": 10**9}, "max_tokens"),
    "max_tokens beyond 64 bits": ({"max_tokens": 10**30}, "max_tokens"),
    "max_tokens is text": ({"max_tokens": "5"}, "max_tokens"),
    "max_completion_tokens 0": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "temperature negative": ({"temperature": -0.1}, "temperature"),
    "temperature too high": ({"temperature": 2.1}, "temperature"),
    "temperature is text": ({"temperature": "warm"}, "temperature"),
    "top_p below 0": ({"top_p": -0.1}, "top_p"),
    "top_p too high": ({"top_p": 1.5}, "top_p"),
    "top_k too low": ({"top_k": -5}, "top_k"),
    "min_p too high": ({"min_p": 2}, "min_p"),
    "presence_penalty": ({"presence_penalty": 3}, "presence_penalty"),
    "frequency_penalty": ({"frequency_penalty": -3}, "frequency_penalty"),
    "n 0": ({"n": 0}, "n"),
    "n too large": ({"n": 100_000}, "n"),
    "stop empty": ({"stop": ""}, "stop"),
    "too many stops": ({"stop": ["x"] * 100}, "stop"),
    "top_logprobs without logprobs": ({"top_logprobs": 3}, "top_logprobs"),
    "top_logprobs too many": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "bias of a token that is none": ({"logit_bias": {"99999": 1}}, "logit_bias"),
    "bias out of range": ({"logit_bias": {"1": 101}}, "logit_bias"),
    "tool_choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "unknown response_format": ({"response_format": {"type": "xml"}}, "response_format"),
    "seed beyond 64 bits": ({"seed": 2**70}, "seed"),
    "timeout 0": ({"timeout": 0}, "timeout"),
    "a template variable of ours": ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", FAULTY_FIELDS)
def test_a_faulty_field_is_named(tiny, name, stream):
    fields, param = FAULTY_FIELDS[name]
    error = check_error(tiny.post(CHAT, {"messages": USER, "stream": stream, **fields}), 400)
    assert error["type"] == "invalid_request_error"
    assert str(error["param"]).startswith(param), error


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "hi"}], "top_p": 1e999}',
        b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    ],
    ids=[
        *("empty", "cut", "list", "null", "text", "bad UTF-8", "lone surrogate"),
        *("NaN", "Infinity", "1e999", "long number", "deep list", "deep object"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, EMBED])
def test_a_body_that_is_no_request(tiny, content, path):
    answer = tiny.post(path, content=content, headers={"content-type": "application/json"})
    assert check_error(answer, 400)["type"] == "invalid_request_error"


def test_a_body_of_ten_megabytes(tiny):
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    answer = tiny.post(CHAT, content=body, headers={"content-type": "application/json"})
    check_error(answer, 413, "request_too_large")


def test_a_prompt_longer_than_the_context_gets_both_numbers(tiny):
    for path, fields in (
        (CHAT, {"messages": [{"role": "user", "content": "zq" * 500}]}),
        (TEXT, {"prompt": "zq" * 500}),
    ):
        error = check_error(tiny.post(path, fields), 400, "context_length_exceeded")
        assert "511" in error["message"] or "512" in error["message"]
        assert "10" in error["message"]  # a thousand tokens, and some for the template
    exact = check_error(tiny.post(TEXT, {"prompt": [65] * 700}), 400, "context_length_exceeded")
    assert "700" in exact["message"]
    million = check_error(tiny.post(TEXT, {"prompt": "zq" * 2_000_000}), 400, "context_length_exceeded")
    assert "at least" in million["message"]


def test_a_prompt_that_leaves_less_room_than_max_tokens_ends_with_length(tiny):
    body = {"prompt": [65] * 500, "max_tokens": 100, "ignore_eos": True}
    answer = tiny.post(TEXT, body).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize(
    "name", ["gpt-4o", "/etc/passwd", "../../etc/passwd", "~/x.gguf", "a" * 500, "\n", "tiny.gguf", "..", "a\x00b"]
)
def test_a_model_that_is_not_served(tiny, tiny_client, name):
    check_error(tiny.post(CHAT, {"messages": USER, "model": name}), 404, "model_not_found")
    check_error(tiny.post(EMBED, {"input": "x", "model": name}), 404, "model_not_found")
    with pytest.raises(openai.NotFoundError):
        tiny_client.completions.create(model=name, prompt="x")


def test_a_model_may_not_be_named_by_its_path(tiny, tiny_model):
    check_error(tiny.post(CHAT, {"messages": USER, "model": str(tiny_model)}), 404, "model_not_found")


def test_an_unknown_adapter(tiny):
    for fields in ({"adapter": "none-such"}, {"adapters": [{"name": "none-such"}]}):
        check_error(tiny.post(CHAT, {"messages": USER, **fields}), 404, "adapter_not_found")


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "unfinished',
        "root ::= missing",
        'other ::= "no root"',
        "root ::= [",
        "",
        'root ::= root "a" | "b"',
        'root ::= a\na ::= b\nb ::= a "x" | "y"',
        "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000,
        'root ::= ((("a"{1,1000}){1,1000}){1,1000}){1,1000}',
        'root ::= "\x00"',
        "root ::= " + '"a"? ' * 3000,
        "root ::= (" + " | ".join(['"a"'] * 3000) + ")*",
    ],
    ids=[
        *("cut string", "missing rule", "no root", "open class", "empty", "left recursion", "indirect recursion"),
        *("deep", "nested repeats", "NUL", "many repeats", "many choices"),
    ],
)
def test_a_faulty_grammar(tiny, grammar):
    error = check_error(tiny.post(CHAT, {"messages": USER, "grammar": grammar, "max_tokens": 2}), 400)
    assert error["code"] in {"invalid_grammar", "invalid_value"}, error


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ({"type": "object", "properties": {"a": {"$ref": "http://example.com/other.json"}}}, "a"),
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "a"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/missing"}}}, "a"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}, "a"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, ""),
    ],
    ids=["foreign $ref", "not", "missing $ref", "lookahead", "impossible"],
)
def test_a_schema_that_cannot_be_expressed(tiny, schema, part):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    error = check_error(tiny.post(CHAT, {"messages": USER, "response_format": wanted}), 400, "invalid_json_schema")
    assert part in error["message"]
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = {"messages": USER, "tools": [tool], "tool_choice": "required"}
    check_error(tiny.post(CHAT, body), 400, "invalid_json_schema")


def test_a_suffix_on_a_model_that_cannot_fill_in(tiny):
    error = check_error(tiny.post(TEXT, {"prompt": "a", "suffix": "b"}), 400)
    assert error["param"] == "suffix"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [-1]},
        {"prompt": [10**6]},
        {"prompt": "x", "best_of": 1, "n": 2},
        {"prompt": "x", "best_of": 2, "stream": True},
        {"prompt": "x", "logprobs": 6},
        {"prompt": ["x"] * 2000},
        {"prompt": "x", "echo": True, "logprobs": 1},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_faulty_completion(tiny, fields):
    check_error(tiny.post(TEXT, fields), 400)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"input": ""},
        {"input": []},
        {"input": ["x", ""]},
        {"input": [10**6]},
        {"input": "x", "dimensions": 0},
        {"input": "x", "dimensions": 10**6},
        {"input": "x", "encoding_format": "hex"},
        {"input": 7},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_faulty_embedding_request(tiny, fields):
    check_error(tiny.post(EMBED, fields), 400)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "x", "path": "/no/such/file.gguf"}, (400, 404)),
        ({"name": "x", "path": "/etc/passwd"}, (400,)),
        ({"name": "x", "path": "/dev/zero"}, (400, 404)),
        ({"name": "x", "path": "/"}, (400, 404)),
        ({"name": "x", "path": "/" + "x" * 4000}, (400,)),
        ({"name": "../x", "path": "/x"}, (400,)),
        ({"name": "none-such"}, (404,)),
        ({}, (400,)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_adapter_that_cannot_be_loaded(tiny, body, status):
    answer = tiny.post("/v1/adapters", body)
    assert answer.status_code in status, answer.text
    check_error(answer, answer.status_code)


def test_a_model_is_no_adapter(tiny, tiny_model):
    check_error(tiny.post("/v1/adapters", {"name": "x", "path": str(tiny_model)}), 400)


def test_unknown_paths_and_methods(tiny):
    check_error(tiny.get("/v1/nothing"), 404, "not_found")
    check_error(tiny.get(CHAT), 405, "method_not_allowed")
