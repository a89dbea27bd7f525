"""Answers: OpenAI's own types read them strictly, and the very nulls that OpenAI sends are sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion as OpenAICompletion
from openai.types import CreateEmbeddingResponse
from openai.types import Model as OpenAIModel
from openai.types.chat import ChatCompletion as OpenAIChat
from openai.types.chat import ChatCompletionChunk as OpenAIChunk
from pydantic import TypeAdapter

from edgellm.engine.types import Usage as EngineUsage
from serving.wire.adapters import Adapter, AdapterList, AdapterUnloaded
from serving.wire.chat import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    ContentChunks,
    Delta,
    FunctionCall,
    FunctionDelta,
    MessageToolCall,
    ToolCallDelta,
)
from serving.wire.common import Logprobs, TokenLogprob, TopLogprob, Usage
from serving.wire.completions import Completion, CompletionChoice, CompletionLogprobs
from serving.wire.embeddings import Embedding, EmbeddingResponse, EmbeddingUsage, encode_embedding
from serving.wire.health import Health
from serving.wire.models import Model, ModelDeleted, ModelList

USAGE = Usage.total(EngineUsage(7, 3, 5, 2, 1))


def strict(kind: Any, answer: Any) -> dict[str, Any]:
    """The answer's JSON, after OpenAI's own type has read it without coercing anything."""
    data = answer.to_json()
    TypeAdapter(kind).validate_json(data, strict=True)
    return json.loads(data)


LOGPROBS = Logprobs(
    content=[
        TokenLogprob(
            token="Hi", logprob=-0.5, bytes=[72, 105], top_logprobs=[TopLogprob(token="Hi", logprob=-0.5, bytes=None)]
        )
    ]
)


class TestAnswers:
    def test_chat(self) -> None:
        message = AnswerMessage(content="Hi")
        choice = Choice(index=0, message=message, logprobs=LOGPROBS, finish_reason="stop")
        answer = ChatCompletion(id="chatcmpl-1", created=1, model="m", choices=[choice], usage=USAGE)
        assert strict(OpenAIChat, answer) == {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hi", "refusal": None},
                    "logprobs": {
                        "content": [
                            {
                                "token": "Hi",
                                "logprob": -0.5,
                                "bytes": [72, 105],
                                "top_logprobs": [{"token": "Hi", "logprob": -0.5, "bytes": None}],
                            }
                        ],
                        "refusal": None,
                    },
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": 7,
                "completion_tokens": 3,
                "total_tokens": 10,
                "prompt_tokens_details": {"cached_tokens": 5},
                "completion_tokens_details": {
                    "reasoning_tokens": 0,
                    "accepted_prediction_tokens": 2,
                    "rejected_prediction_tokens": 1,
                },
            },
            "system_fingerprint": None,
            "service_tier": "default",
        }

    def test_tool_calls(self) -> None:
        call = MessageToolCall(id="call_1", function=FunctionCall(name="f", arguments="{}"))
        choice = Choice(index=0, message=AnswerMessage(tool_calls=[call]), finish_reason="tool_calls")
        answer = ChatCompletion(id="x", created=1, model="m", choices=[choice], usage=USAGE)
        assert strict(OpenAIChat, answer)["choices"][0] == {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            "logprobs": None,
            "finish_reason": "tool_calls",
        }

    @pytest.mark.parametrize(
        ("delta", "finish", "expected"),
        [
            (
                Delta(role="assistant", content="", refusal=None),
                None,
                '{"role":"assistant","content":"","refusal":null}',
            ),
            (Delta(content="é"), None, '{"content":"é"}'),
            (Delta(), "stop", "{}"),
            (
                Delta(tool_calls=[ToolCallDelta(index=0, function=FunctionDelta(arguments='{"'))]),
                None,
                '{"tool_calls":[{"index":0,"function":{"arguments":"{\\""}}]}',
            ),
            (
                Delta(
                    tool_calls=[
                        ToolCallDelta(index=0, id="c", type="function", function=FunctionDelta(name="f", arguments=""))
                    ]
                ),
                None,
                '{"tool_calls":[{"index":0,"id":"c","type":"function","function":{"name":"f","arguments":""}}]}',
            ),
        ],
    )
    def test_chunks(self, delta: Delta, finish: Any, expected: str) -> None:
        chunk = ChatCompletionChunk(
            id="x", created=1, model="m", choices=[ChunkChoice(index=0, delta=delta, finish_reason=finish)]
        )
        strict(OpenAIChunk, chunk)
        end = json.dumps(finish)
        assert chunk.to_json().decode() == (
            '{"id":"x","object":"chat.completion.chunk","created":1,"model":"m",'
            f'"choices":[{{"index":0,"delta":{expected},"logprobs":null,"finish_reason":{end}}}],'
            '"system_fingerprint":null,"service_tier":"default"}'
        )

    def test_usage_chunk(self) -> None:
        last = ChatCompletionChunk(id="x", created=1, model="m", choices=[], usage=USAGE)
        assert strict(OpenAIChunk, last)["usage"]["total_tokens"] == 10
        other = ChatCompletionChunk(id="x", created=1, model="m", choices=[], usage=None)
        assert strict(OpenAIChunk, other)["usage"] is None

    @given(st.text(), st.text(), st.booleans(), st.integers(0, 127))
    def test_content_chunks_equal_the_model(self, text: str, model: str, with_usage: bool, index: int) -> None:
        usage = {"usage": None} if with_usage else {}
        base = ChatCompletionChunk(id="x", created=1, model=model, choices=[], **usage)
        choice = ChunkChoice(index=index, delta=Delta(content=text))
        whole = ChatCompletionChunk(id="x", created=1, model=model, choices=[choice], **usage)
        assert ContentChunks(base, index).encode(text) == whole.to_json()

    def test_completion(self) -> None:
        logprobs = CompletionLogprobs(
            tokens=["a", "b"], token_logprobs=[-1.0, -2.0], top_logprobs=[{"a": -1.0}, {"b": -2.0}], text_offset=[0, 1]
        )
        choices = [
            CompletionChoice(text="ab", index=0, logprobs=logprobs, finish_reason="length"),
            CompletionChoice(text="", index=1, finish_reason="stop"),
        ]
        found = strict(OpenAICompletion, Completion(id="cmpl-1", created=1, model="m", choices=choices, usage=USAGE))
        assert found["object"] == "text_completion"
        assert found["choices"][1] == {"text": "", "index": 1, "logprobs": None, "finish_reason": "stop"}

    def test_embeddings(self) -> None:
        assert encode_embedding([1.0, -2.5], "base64") == "AACAPwAAIMA="
        vector = encode_embedding([1.0, -2.5], "float")
        usage = EmbeddingUsage(prompt_tokens=2, total_tokens=2)
        answer = EmbeddingResponse(data=[Embedding(index=0, embedding=vector)], model="m", usage=usage)
        assert strict(CreateEmbeddingResponse, answer) == {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": [1.0, -2.5]}],
            "model": "m",
            "usage": {"prompt_tokens": 2, "total_tokens": 2},
        }

    def test_models(self) -> None:
        model = Model(id="m", created=1, owned_by="edgellm")
        assert strict(OpenAIModel, model) == {"id": "m", "object": "model", "created": 1, "owned_by": "edgellm"}
        assert json.loads(ModelList(data=[model]).to_json())["object"] == "list"
        assert json.loads(ModelDeleted(id="m", deleted=True).to_json()) == {
            "id": "m",
            "object": "model",
            "deleted": True,
        }

    def test_our_own(self) -> None:
        adapter = Adapter(id="a", model="m", scale=0.5)
        assert AdapterList(data=[adapter]).to_json() == (
            b'{"object":"list","data":[{"id":"a","object":"adapter","model":"m","scale":0.5}]}'
        )
        assert AdapterUnloaded(id="a").to_json() == b'{"id":"a","object":"adapter","deleted":true}'
        assert Health(status="ok").to_json() == b'{"status":"ok"}'

    def test_usages_add_up(self) -> None:
        two = Usage.total(EngineUsage(7, 3, 2), EngineUsage(7, 4, 7))
        assert (two.prompt_tokens, two.completion_tokens, two.total_tokens) == (7, 7, 14)
        assert two.prompt_tokens_details.cached_tokens == 2
        both = two + USAGE
        assert (both.prompt_tokens, both.completion_tokens, both.total_tokens) == (14, 10, 24)
        assert both.prompt_tokens_details.cached_tokens == 7
        assert both.completion_tokens_details.accepted_prediction_tokens == 2
