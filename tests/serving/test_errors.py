"""Every exception as HTTP: the table, and the handlers in a real application on a real port."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from edgellm import errors
from serving.errors import ERROR_RESPONSES, error_body, http_error, install
from serving.wire.chat import ChatCompletionRequest
from serving.wire.error import ErrorEnvelope
from tests.serving.live import Answer, Connection, post, serve

TABLE: list[tuple[BaseException, int, str, str, str | None]] = [
    (errors.RequestError("x", "stop"), 400, "invalid_request_error", "invalid_value", "stop"),
    (errors.ContextLengthError(9, 8), 400, "invalid_request_error", "context_length_exceeded", None),
    (
        errors.SchemaError("x", "/a", "response_format"),
        400,
        "invalid_request_error",
        "invalid_json_schema",
        "response_format",
    ),
    (errors.GrammarError("x"), 400, "invalid_request_error", "invalid_grammar", "grammar"),
    (errors.ChatTemplateError("x"), 400, "invalid_request_error", "chat_template_error", "messages"),
    (
        errors.TrainingDataError([(0, "x")], "validation_file"),
        400,
        "invalid_request_error",
        "invalid_training_file",
        "validation_file",
    ),
    (errors.FileTooLargeError("x"), 413, "invalid_request_error", "request_too_large", "file"),
    (errors.JobStateError("x", "id"), 400, "invalid_request_error", "invalid_job_state", "id"),
    (errors.StoredFileNotFoundError("x"), 404, "invalid_request_error", "file_not_found", "id"),
    (errors.JobNotFoundError("x"), 404, "invalid_request_error", "job_not_found", "id"),
    (errors.BaseChangedError("x"), 500, "server_error", "model_changed", "model"),
    (errors.NotInstalledError("x"), 501, "server_error", "not_installed", None),
    (errors.StorageError("x"), 507, "server_error", "storage_failed", None),
    (errors.NotFoundError("x"), 404, "invalid_request_error", "not_found", None),
    (errors.ModelNotFoundError("x"), 404, "invalid_request_error", "model_not_found", "model"),
    (errors.AdapterNotFoundError("x"), 404, "invalid_request_error", "adapter_not_found", "adapter"),
    (errors.ModelUnsupportedError("x"), 400, "invalid_request_error", "model_unsupported", "model"),
    (errors.InvalidModelFileError("x"), 500, "server_error", "invalid_model_file", "model"),
    (errors.ModelLoadError("x"), 500, "server_error", "model_load_failed", "model"),
    (errors.ModelError("x"), 500, "server_error", "model_error", "model"),
    (errors.PullError("x"), 502, "server_error", "model_pull_failed", "model"),
    (
        errors.ModelTooLargeError("x", needed_bytes=9, budget_bytes=8),
        400,
        "invalid_request_error",
        "model_too_large",
        "model",
    ),
    (
        errors.ModelTooLargeError("x", needed_bytes=7, budget_bytes=8, in_use_bytes=5),
        503,
        "server_error",
        "model_too_large",
        "model",
    ),
    (errors.AdapterError("x"), 400, "invalid_request_error", "invalid_adapter", "adapter"),
    (errors.OverloadedError("x"), 503, "server_error", "overloaded", None),
    (errors.ShuttingDownError("x"), 503, "server_error", "shutting_down", None),
    (errors.RequestTimeoutError("x"), 504, "server_error", "request_timeout", None),
    (errors.GuardFailedError("x"), 500, "server_error", "guard_failed", None),
    (errors.BackendError("x"), 500, "server_error", "backend_error", None),
    (errors.ExpertReadError("x"), 500, "server_error", "expert_read_failed", None),
    (errors.InvalidTraceError("x"), 500, "server_error", "server_error", None),
    (errors.PackError("x"), 500, "server_error", "server_error", None),
    (errors.ConfigError("x"), 500, "server_error", "config_error", None),
    (errors.EdgeLLMError("x"), 500, "server_error", "server_error", None),
    (ClientDisconnect(), 499, "invalid_request_error", "client_closed_request", None),
    (HTTPException(413, "x"), 413, "invalid_request_error", "request_too_large", None),
    (HTTPException(418, "x"), 418, "invalid_request_error", "http_418", None),
    (KeyError("secret"), 500, "server_error", "internal_error", None),
]


@pytest.mark.parametrize(("exc", "status", "kind", "code", "param"), TABLE, ids=lambda value: type(value).__name__)
def test_table(exc: BaseException, status: int, kind: str, code: str, param: str | None) -> None:
    found = http_error(exc)
    assert (found.status, found.body.type, found.body.code, found.body.param) == (status, kind, code, param)
    assert found.body == error_body(exc)
    assert found.body.message
    assert "secret" not in found.body.message


def all_errors(base: type[errors.EdgeLLMError]) -> Iterator[type[errors.EdgeLLMError]]:
    yield base
    for below in base.__subclasses__():
        yield from all_errors(below)


def test_the_table_is_complete() -> None:
    public = {kind for kind in all_errors(errors.EdgeLLMError) if kind.__module__ == errors.__name__}
    assert {type(row[0]) for row in TABLE} >= public


def test_headers() -> None:
    assert http_error(errors.OverloadedError("x", retry_after_s=3)).headers == {"retry-after": "3"}
    assert "retry-after" in http_error(errors.ShuttingDownError("x")).headers
    assert http_error(errors.RequestTimeoutError("x")).headers == {"x-should-retry": "false"}
    busy = errors.ModelTooLargeError("x", needed_bytes=7, budget_bytes=8, in_use_bytes=5)
    assert "retry-after" in http_error(busy).headers


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    app = FastAPI(responses=ERROR_RESPONSES)
    install(app)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatCompletionRequest) -> dict[str, Any]:
        return {"n": body.n}

    @app.get("/raise/{kind}")
    async def fail(kind: str) -> None:
        if kind == "context":
            raise errors.ContextLengthError(5000, 2048, param="messages")
        if kind == "overloaded":
            raise errors.OverloadedError("The queue is full.", retry_after_s=2)
        raise RuntimeError("a secret")

    @app.get("/count/{number}")
    async def count(number: int, limit: int = 3) -> None: ...

    with serve(app) as port:
        yield port


def get(port: int, path: str, method: str = "GET") -> Answer:
    with Connection(port) as connection:
        connection.send(method, path, [("Host", "127.0.0.1")])
        return connection.answer()


def chat(port: int, body: bytes) -> Answer:
    answer = post(port, "/v1/chat/completions", body)
    assert answer.header("content-type") == "application/json"
    ErrorEnvelope.model_validate_json(answer.body)
    assert list(answer.error) == ["message", "type", "param", "code"]
    return answer


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b"", "missing_required_parameter", "needs a JSON body"),
        (b"{", "invalid_json", "not valid JSON"),
        (b'{"a": 1,}', "invalid_json", "not valid JSON"),
        (b'{"a": "\xff"}', "invalid_utf8", "UTF-8"),
        (b"[]", "invalid_type", "must be an object"),
        (b'"x"', "invalid_type", "must be an object"),
        (b"[" * 100_000, "invalid_json", "nested too deeply"),
        (b'{"n": ' + b"1" * 5000 + b"}", "invalid_json", "too many digits"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": NaN}', "invalid_type", "'n'"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "invalid_value", "'temperature'"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_value", "'messages[0].content'"),
        (b'{"messages": [{"role": "\\ud800", "content": ""}]}', "invalid_value", "'messages[0].role'"),
        (b'{"messages": [], "\\ud800": 1}', "invalid_value", "'messages'"),
        (b'{"messages": 5}', "invalid_type", "'messages': must be an array, not 5"),
        (b'{"messages": [{"role": "user"}]}', "missing_required_parameter", "'messages[0].content'"),
    ],
)
def test_bad_bodies(port: int, body: bytes, code: str, words: str) -> None:
    answer = chat(port, body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["code"] == code
    assert words in answer.error["message"]


def test_good_body(port: int) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "n": 2, "unknown": {"x": [1]}}'
    assert post(port, "/v1/chat/completions", body).body == b'{"n":2}'


def test_openai_client_sees_its_exceptions(port: int) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], temperature=3)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="There is no such endpoint: POST /v1/embeddings"):
        client.embeddings.create(model="m", input="x")


def test_paths_and_methods(port: int) -> None:
    answer = get(port, "/nowhere")
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    answer = get(port, "/v1/chat/completions", "DELETE")
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.header("allow") == "POST"


def test_path_and_query_parameters(port: int) -> None:
    assert get(port, "/count/x").error["param"] == "number"
    answer = get(port, "/count/3?limit=y")
    assert (answer.status, answer.error["param"]) == (400, "limit")


def test_deliberate_errors(port: int) -> None:
    answer = get(port, "/raise/context")
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert "2048" in answer.error["message"]
    assert "5000" in answer.error["message"]
    answer = get(port, "/raise/overloaded")
    assert (answer.status, answer.header("retry-after")) == (503, "2")


def test_unexpected_errors_are_logged_once_and_keep_the_connection(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with Connection(port) as connection:
        for _ in range(2):
            caplog.clear()
            connection.send("GET", "/raise/bug", [("Host", "127.0.0.1")])
            answer = connection.answer()
            assert (answer.status, answer.error["code"]) == (500, "internal_error")
            assert b"secret" not in answer.body
            [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
            assert record.exc_info is not None
            assert "a secret" in str(record.exc_info[1])


def test_openapi_documents_the_envelope(port: int) -> None:
    import json

    document = json.loads(get(port, "/openapi.json").body)
    answers = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(answers) == {"200", "4XX", "5XX"}
    assert answers["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorEnvelope")
