"""Requests: what is taken, what is refused, and in what words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from edgellm.engine.types import AdapterUse, SamplingParams
from serving.faults import describe
from serving.wire.adapters import AdapterLoadRequest
from serving.wire.chat import (
    ChatCompletionRequest,
)
from serving.wire.common import RequestModel
from serving.wire.completions import CompletionRequest
from serving.wire.embeddings import EmbeddingRequest
from serving.wire.messages import AssistantMessage, text_of
from serving.wire.sampling import SEEDS, seed32

USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [USER], **fields})


def fault_of(model: type[RequestModel], body: Any) -> tuple[str | None, str]:
    """The path and the sentence that a client would get."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    found = describe(errors, body)
    return found.param, found.message


def chat_fault(**fields: Any) -> tuple[str | None, str]:
    return fault_of(ChatCompletionRequest, {"messages": [USER], **fields})


class TestChatRequest:
    def test_defaults(self) -> None:
        request = chat()
        assert request.sampling(random_seed=5) == SamplingParams(seed=5)
        assert (request.n, request.stream, request.limit_tokens, request.stops) == (1, False, None, ())
        assert (request.logprob_count, request.include_usage, request.adapter_uses) == (None, False, ())

    def test_null_is_default_and_unknown_fields_are_ignored(self) -> None:
        nulls = dict.fromkeys(ChatCompletionRequest.model_fields, None)
        assert ChatCompletionRequest.model_validate({**nulls, "messages": [USER], "foo": {"bar": 1}}) == chat()

    def test_sampling(self) -> None:
        request = chat(temperature=0, top_p=0.5, top_k=-1, min_p=0.1, logit_bias={"12": -100, "0": 1.5}, seed=-1)
        assert request.sampling(random_seed=1) == SamplingParams(
            temperature=0.0, top_p=0.5, min_p=0.1, logit_bias=((12, -100.0), (0, 1.5)), seed=SEEDS - 1
        )

    @given(st.integers(-(2**63), 2**63 - 1))
    def test_every_seed_has_a_place(self, seed: int) -> None:
        assert 0 <= seed32(seed) <= 2**32 - 2
        assert chat(seed=seed).sampling(random_seed=0).seed == seed32(seed)
        if 0 <= seed < SEEDS:
            assert seed32(seed) == seed

    def test_messages_of_all_roles(self) -> None:
        call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        request = chat(
            messages=[
                {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "developer", "content": "x", "name": "dev"},
                USER,
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}, {"type": "text", "text": "!"}]},
            ]
        )
        assert [text_of(message.content) for message in request.messages] == ["ab", "x", "Hello", "", "sunny", "no!"]
        assert isinstance(request.messages[3], AssistantMessage)
        assert request.messages[3].tool_calls is not None
        assert request.messages[3].tool_calls[0].function.arguments == "{}"

    def test_stop_adapters_and_limits(self) -> None:
        request = chat(stop=["a", "b"], adapters=[{"name": "x"}, {"name": "y", "scale": -0.5}], max_tokens=5)
        assert request.stops == ("a", "b")
        assert request.adapter_uses == (AdapterUse("x"), AdapterUse("y", -0.5))
        assert request.limit_tokens == 5
        assert chat(stop="a", adapter="x").stops == ("a",)
        assert chat(adapter="x").adapter_uses == (AdapterUse("x"),)
        assert chat(max_completion_tokens=9).limit_tokens == 9
        assert chat(logprobs=True).logprob_count == 0
        assert chat(logprobs=True, top_logprobs=3).logprob_count == 3
        assert chat(stream=True, stream_options={"include_usage": True, "include_obfuscation": False}).include_usage

    @pytest.mark.parametrize(
        "choice",
        [
            "none",
            "auto",
            "required",
            NAMED,
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}},
        ],
    )
    def test_tool_choices(self, choice: Any) -> None:
        assert chat(tools=[TOOL], tool_choice=choice).model_dump()["tool_choice"] == choice

    def test_schema_of_a_response_format(self) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        request = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        assert request.response_format is not None
        assert request.response_format.type == "json_schema"
        assert request.response_format.json_schema.schema_ == schema

    @pytest.mark.parametrize(
        ("fields", "param", "words"),
        [
            ({"messages": []}, "messages", "must not be empty"),
            ({"messages": None}, "messages", "Missing required parameter"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
            ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role", "'tool'"),
            ({"messages": [USER, {"content": "x"}]}, "messages[1].role", "Missing"),
            ({"messages": [USER, "x"]}, "messages[1]", "must be an object, not 'x'"),
            ({"messages": [{"role": "user"}]}, "messages[0].content", "Missing"),
            ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a string, not 5"),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "valid Unicode"),
            ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "must not be empty"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
                "messages[0].content[0].type",
                "text only",
            ),
            (
                {"messages": [{"role": "assistant", "content": [{"text": "x"}]}]},
                "messages[0].content[0].type",
                "Missing",
            ),
            ({"messages": [{"role": "assistant"}]}, "messages[0].content", "tool_calls"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "Missing"),
            (
                {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}]},
                "messages[0].tool_calls[0].function",
                "Missing",
            ),
            ({"model": 5}, "model", "string"),
            ({"max_tokens": 0}, "max_tokens", "at least 1, not 0"),
            ({"max_tokens": -3}, "max_tokens", "at least 1"),
            ({"max_tokens": "5"}, "max_tokens", "must be an integer, not '5'"),
            ({"max_tokens": True}, "max_tokens", "must be an integer, not true"),
            ({"max_tokens": 5.0}, "max_tokens", "integer"),
            ({"max_tokens": 10**30}, "max_tokens", "at most"),
            ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one"),
            ({"temperature": 2.1}, "temperature", "at most 2, not 2.1"),
            ({"temperature": float("nan")}, "temperature", "finite"),
            ({"temperature": float("inf")}, "temperature", "finite"),
            ({"temperature": False}, "temperature", "must be a number, not false"),
            ({"top_p": -0.1}, "top_p", "at least 0"),
            ({"top_p": 1.01}, "top_p", "at most 1"),
            ({"n": 0}, "n", "at least 1"),
            ({"n": 129}, "n", "at most 128"),
            ({"seed": 2**63}, "seed", "at most"),
            ({"presence_penalty": 3}, "presence_penalty", "at most 2"),
            ({"frequency_penalty": -2.5}, "frequency_penalty", "at least -2"),
            ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
            ({"top_k": -2}, "top_k", "at least -1"),
            ({"min_p": 1.5}, "min_p", "at most 1"),
            ({"stop": ""}, "stop", "must not be empty"),
            ({"stop": []}, "stop", "must not be empty"),
            ({"stop": ["a", ""]}, "stop[1]", "must not be empty"),
            ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
            ({"stop": 5}, "stop", "string"),
            ({"logit_bias": {"hello": 1}}, "logit_bias.hello", "match"),
            ({"logit_bias": {"٣": 1}}, "logit_bias['٣']", "match"),
            ({"logit_bias": {"4294967296": 1}}, "logit_bias", "not a token id"),
            ({"logit_bias": {"1": 101}}, "logit_bias.1", "at most 100"),
            ({"top_logprobs": 3}, "top_logprobs", "'logprobs' is true"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
            ({"logprobs": 1}, "logprobs", "true or false"),
            ({"stream": "true"}, "stream", "true or false"),
            ({"stream_options": {"include_usage": True}}, "stream_options", "'stream' is true"),
            ({"timeout": 0}, "timeout", "greater than 0"),
            ({"adapter": "a", "adapters": [{"name": "b"}]}, "adapter", "'adapters'"),
            ({"adapters": [{"name": "a"}, {"name": "a"}]}, "adapters", "twice"),
            ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
            ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Missing"),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
                "response_format.json_schema.name",
                "match",
            ),
            ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "must be 'function'"),
            ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "earlier tool"),
            ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "match"),
            (
                {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"x": float("nan")}}}]},
                "tools[0].function.parameters",
                "NaN",
            ),
            (
                {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"x": "\ud800"}}}]},
                "tools[0].function.parameters",
                "Unicode",
            ),
            ({"tool_choice": "required"}, "tool_choice", "'tools' are given"),
            ({"tool_choice": NAMED}, "tool_choice", "'tools' are given"),
            ({"tool_choice": "sometimes", "tools": [TOOL]}, "tool_choice", "'auto'"),
            ({"tool_choice": {}, "tools": [TOOL]}, "tool_choice.type", "Missing"),
            (
                {"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": [TOOL]},
                "tool_choice.function.name",
                "'other'",
            ),
            (
                {"tool_choice": "required", "tools": [TOOL], "response_format": {"type": "json_object"}},
                "response_format",
                "both cannot hold",
            ),
            ({"grammar": "root ::= 'a'", "response_format": {"type": "json_object"}}, "grammar", "give one"),
            ({"functions": [{"name": "f"}]}, "functions", "'tools'"),
            ({"function_call": {"name": "f"}}, "function_call", "'tools'"),
            ({"modalities": ["text", "audio"]}, "modalities", "text only"),
            ({"continue_final_message": True}, "continue_final_message", "assistant"),
        ],
    )
    def test_refused(self, fields: dict[str, Any], param: str, words: str) -> None:
        found, message = chat_fault(**fields)
        assert found == param
        assert words in message
        assert message.endswith((".", ".)"))
        assert "\ud800" not in message

    def test_several_faults_name_the_first(self) -> None:
        assert chat_fault(n=0, temperature=9)[1].endswith("(1 more error in the request.)")

    @pytest.mark.parametrize("body", [5, [], "x", True])
    def test_a_body_that_is_no_object(self, body: Any) -> None:
        assert fault_of(ChatCompletionRequest, body)[1].startswith("The request body must be an object")

    def test_deep_nesting_is_refused_or_taken_but_never_crashes(self) -> None:
        deep: Any = {}
        for _ in range(100_000):
            deep = {"a": deep}
        param, message = chat_fault(chat_template_kwargs=deep)
        assert param == "chat_template_kwargs"
        assert "nested" in message


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": [-1] * 100_000}),
        (CompletionRequest, {"prompt": [[-1] * 1000] * 100}),
        (CompletionRequest, {"prompt": [""] * 2000}),
        (EmbeddingRequest, {"input": [[]] * 2000}),
        (ChatCompletionRequest, {"messages": [{}] * 4000}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{}] * 1000}] * 100}),
        (ChatCompletionRequest, {"messages": [{"role": "assistant", "tool_calls": [{}] * 100}] * 100}),
        (ChatCompletionRequest, {"messages": [USER], "tools": [{}] * 100}),
        (ChatCompletionRequest, {"messages": [USER], "logit_bias": {f"x{i}": 1 for i in range(100_000)}}),
    ],
)
def test_many_faults_do_not_make_many_errors(model: type[RequestModel], body: Any) -> None:
    """Each error takes about a kilobyte; a body of some megabytes could have millions."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() < 5


class TestCompletionRequest:
    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("a", ("a",)),
            (["a", "b"], ("a", "b")),
            ([1, 2], ((1, 2),)),
            ([[1], [2, 3]], ((1,), (2, 3))),
        ],
    )
    def test_forms_of_prompts(self, prompt: Any, expected: Any) -> None:
        assert CompletionRequest.model_validate({"prompt": prompt}).prompts == expected
        assert EmbeddingRequest.model_validate({"input": prompt}).inputs == expected

    def test_default_max_tokens(self) -> None:
        assert CompletionRequest.model_validate({"prompt": "a", "max_tokens": None}).max_tokens == 16

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": []}, "prompt"),
            ({"prompt": [""]}, "prompt[0]"),
            ({"prompt": [[]]}, "prompt[0]"),
            ({"prompt": [1, "a"]}, "prompt[1]"),
            ({"prompt": [[1], [2, "x"]]}, "prompt[1][1]"),
            ({"prompt": [True]}, "prompt[0]"),
            ({"prompt": [-1]}, "prompt[0]"),
            ({"prompt": {"text": "a"}}, "prompt"),
            ({"prompt": ["a"] * 2049}, "prompt"),
            ({"prompt": ["a"] * 100, "n": 100}, "prompt"),
            ({"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
            ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
            ({"prompt": "a", "logprobs": 6}, "logprobs"),
            ({"prompt": "a", "logprobs": True}, "logprobs"),
        ],
    )
    def test_refused(self, fields: dict[str, Any], param: str) -> None:
        assert fault_of(CompletionRequest, fields)[0] == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(sorted({*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, "functions"}))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(FIELDS, JSON, max_size=5), st.sampled_from([ChatCompletionRequest, CompletionRequest]))
def test_any_json_is_taken_or_clearly_refused(body: dict[str, Any], model: type[RequestModel]) -> None:
    for whole in (body, {"messages": [USER], "prompt": "a", **body}):
        try:
            model.model_validate(whole)
        except ValidationError as error:
            errors = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
            found = describe(errors, whole)
            found.message.encode()
            assert 10 < len(found.message) < 500


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "refusal"]),
            JSON | st.sampled_from(["user", "assistant", "tool", "system"]),
        )
    )
)
def test_any_messages_are_taken_or_clearly_refused(messages: list[Any]) -> None:
    try:
        ChatCompletionRequest.model_validate({"messages": messages})
    except ValidationError as error:
        errors = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
        found = describe(errors, {"messages": messages})
        assert found.param is not None
        assert found.param.startswith("messages")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\n", "x" * 129])
def test_adapter_names_are_plain(name: str) -> None:
    assert fault_of(AdapterLoadRequest, {"name": name})[0] == "name"


def test_adapter_load() -> None:
    request = AdapterLoadRequest.model_validate({"name": "my-lora.v2", "path": "/x/y.gguf", "scale": None})
    assert (request.name, request.path, request.scale) == ("my-lora.v2", "/x/y.gguf", 1.0)
    assert fault_of(AdapterLoadRequest, {"name": "a", "path": "a\x00b"})[0] == "path"


def test_json_schema_shows_bounds_and_nulls() -> None:
    fields = ChatCompletionRequest.model_json_schema()["properties"]
    assert fields["temperature"]["anyOf"] == [{"type": "number", "minimum": 0, "maximum": 2}, {"type": "null"}]
    assert fields["messages"]["items"]["discriminator"]["propertyName"] == "role"
    undescribed = [name for name, schema in fields.items() if not schema.get("description")]
    assert undescribed == []


def test_a_grammar_of_open_brackets_is_read_in_one_pass() -> None:
    for opening in ("[", '"', "<", "[\\", "#"):
        assert chat(grammar=opening * 30_000).grammar == opening * 30_000
    with pytest.raises(ValidationError):
        chat(grammar="root ::= " + "(" * 600)
