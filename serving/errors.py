"""Errors to HTTP: the one place that decides status, type, code and headers, in OpenAI's envelope.

A request that ran into its time limit is 504, not 408: 408 invites proxies and browsers to send the request again by
themselves, and the second try would take as long. For the same reason errors that a retry cannot mend carry
`x-should-retry: false`, which the openai client obeys.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgellm import errors
from serving.faults import describe
from serving.wire.error import ErrorBody, ErrorEnvelope

_log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's number; only logs and metrics ever see it
SHUTDOWN_RETRY_AFTER_S = 5
_NO_RETRY = {"x-should-retry": "false"}
_CLIENT, _SERVER = "invalid_request_error", "server_error"

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorEnvelope, "description": "The request is at fault."},
    "5XX": {"model": ErrorEnvelope, "description": "The server is at fault, or busy."},
}
"""For `FastAPI(responses=...)`: the documented shape of errors, in place of FastAPI's own 422."""


@dataclass(frozen=True, slots=True)
class HttpError:
    """An error as HTTP has it."""

    status: int
    body: ErrorBody
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Rule:
    status: int
    code: str
    param: str | None = None  # where the exception does not name one
    headers: Mapping[str, str] = field(default_factory=dict)


# Looked up along the exception's own type and its bases, nearest first.
_RULES: dict[type[BaseException], _Rule] = {
    errors.ContextLengthError: _Rule(400, "context_length_exceeded"),
    errors.SchemaError: _Rule(400, "invalid_json_schema"),
    errors.GrammarError: _Rule(400, "invalid_grammar", "grammar"),
    errors.ChatTemplateError: _Rule(400, "chat_template_error", "messages"),
    errors.TrainingDataError: _Rule(400, "invalid_training_file", "training_file"),
    errors.FileTooLargeError: _Rule(413, "request_too_large", "file"),
    errors.JobStateError: _Rule(400, "invalid_job_state"),
    errors.RequestError: _Rule(400, "invalid_value"),
    errors.ModelNotFoundError: _Rule(404, "model_not_found", "model"),
    errors.AdapterNotFoundError: _Rule(404, "adapter_not_found", "adapter"),
    errors.StoredFileNotFoundError: _Rule(404, "file_not_found", "id"),
    errors.JobNotFoundError: _Rule(404, "job_not_found", "id"),
    errors.NotFoundError: _Rule(404, "not_found"),
    errors.ModelUnsupportedError: _Rule(400, "model_unsupported", "model"),
    errors.InvalidModelFileError: _Rule(500, "invalid_model_file", "model", _NO_RETRY),
    errors.ModelLoadError: _Rule(500, "model_load_failed", "model"),
    errors.PullError: _Rule(502, "model_pull_failed", "model"),
    errors.ModelError: _Rule(500, "model_error", "model"),
    errors.AdapterError: _Rule(400, "invalid_adapter", "adapter"),
    errors.BaseChangedError: _Rule(500, "model_changed", "model", _NO_RETRY),
    errors.NotInstalledError: _Rule(501, "not_installed", None, _NO_RETRY),
    errors.StorageError: _Rule(507, "storage_failed", None, _NO_RETRY),
    errors.OverloadedError: _Rule(503, "overloaded"),
    errors.ShuttingDownError: _Rule(503, "shutting_down", None, {"retry-after": str(SHUTDOWN_RETRY_AFTER_S)}),
    errors.RequestTimeoutError: _Rule(504, "request_timeout", None, _NO_RETRY),
    errors.GuardFailedError: _Rule(500, "guard_failed"),
    errors.ExpertReadError: _Rule(500, "expert_read_failed"),
    errors.BackendError: _Rule(500, "backend_error"),
    errors.ConfigError: _Rule(500, "config_error", None, _NO_RETRY),
    errors.EdgeLLMError: _Rule(500, "server_error"),
    ClientDisconnect: _Rule(CLIENT_CLOSED_REQUEST, "client_closed_request"),
}


def _envelope(
    status: int, message: str, code: str | None, param: str | None = None, headers: Mapping[str, str] | None = None
) -> HttpError:
    kind = _SERVER if status >= 500 else _CLIENT
    return HttpError(status, ErrorBody(message=message, type=kind, param=param, code=code), headers or {})


def _too_large(exc: errors.ModelTooLargeError) -> HttpError:
    """A model over the whole budget never fits: the request's fault. One that others crowd out may fit later."""
    if exc.needed_bytes > exc.budget_bytes:
        return _envelope(400, str(exc), "model_too_large", "model")
    return _envelope(503, str(exc), "model_too_large", "model", {"retry-after": str(SHUTDOWN_RETRY_AFTER_S)})


def _http_exception(exc: HTTPException) -> HttpError:
    """What FastAPI and starlette raise: unknown paths, wrong methods, bodies that cannot be read."""
    headers = dict(exc.headers or {})
    if exc.status_code == 400 and isinstance(exc.__cause__, UnicodeDecodeError):
        return _envelope(400, "The request body is not valid UTF-8.", "invalid_utf8", None, headers)
    if exc.status_code == 400 and isinstance(exc.__cause__, RecursionError):
        return _envelope(400, "The request body is nested too deeply.", "invalid_json", None, headers)
    if exc.status_code == 400 and isinstance(exc.__cause__, ValueError):
        return _envelope(400, "The request body has a number of too many digits.", "invalid_json", None, headers)
    codes = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
    code = codes.get(exc.status_code, f"http_{exc.status_code}")
    return _envelope(exc.status_code, str(exc.detail), code, None, headers)


def http_error(exc: BaseException) -> HttpError:
    """How to answer `exc`. An exception that is not raised on purpose says nothing of what happened."""
    if isinstance(exc, RequestValidationError):
        found = describe(exc.errors(), exc.body)
        return _envelope(400, found.message, found.code, found.param)
    if isinstance(exc, HTTPException):
        return _http_exception(exc)
    if isinstance(exc, errors.ModelTooLargeError):
        return _too_large(exc)
    for kind in type(exc).__mro__:
        rule = _RULES.get(kind)
        if rule is not None:
            message = str(exc) or "The client closed the connection."
            headers = dict(rule.headers)
            if isinstance(exc, errors.OverloadedError):
                headers["retry-after"] = str(exc.retry_after_s)
            return _envelope(rule.status, message, rule.code, getattr(exc, "param", None) or rule.param, headers)
    return _envelope(500, "The server had an internal error; its log says more.", "internal_error")


def error_body(exc: BaseException) -> ErrorBody:
    """The envelope's inside, also for error events in the middle of a stream."""
    return http_error(exc).body


def log_error(exc: BaseException) -> None:
    """A traceback for what nobody raised on purpose, a line for the server's other faults, nothing for the client's."""
    if not isinstance(exc, (errors.EdgeLLMError, HTTPException, RequestValidationError, ClientDisconnect)):
        _log.error("unexpected error while answering a request", exc_info=exc)
    elif http_error(exc).status >= 500:
        _log.warning("%s: %s", type(exc).__name__, exc)


def error_response(exc: BaseException) -> Response:
    """`exc` as a complete response."""
    found = http_error(exc)
    return refusal(found)


def refusal(found: HttpError) -> Response:
    """An HttpError as a complete response."""
    body = ErrorEnvelope(error=found.body).to_json()
    return Response(body, found.status, dict(found.headers), media_type="application/json")


def refuse(
    status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """A response for a fault found outside the application, in a middleware."""
    return refusal(_envelope(status, message, code, param, headers))


class UnexpectedErrors:
    """ASGI middleware: an exception that nobody handles becomes a 500, and its traceback goes to the log, once.

    Starlette's own handler for Exception raises it again, so that it is logged twice and the connection is dropped.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except ClientDisconnect:
            if not started:
                await error_response(ClientDisconnect())(scope, receive, send)
        except Exception as exc:
            if started:
                raise  # half an answer is out: the server has to cut the connection
            log_error(exc)
            await error_response(exc)(scope, receive, send)


async def _answer(request: Request, exc: Exception) -> Response:
    log_error(exc)
    return error_response(exc)


async def _answer_http(request: Request, exc: Exception) -> Response:
    """Unknown paths and methods get a sentence that repeats them."""
    asked = f"{request.method} {request.url.path}"
    if isinstance(exc, HTTPException):
        if exc.status_code == 404 and exc.detail == HTTPStatus.NOT_FOUND.phrase:
            exc = HTTPException(404, f"There is no such endpoint: {asked}.", exc.headers)
        elif exc.status_code == 405 and exc.detail == HTTPStatus.METHOD_NOT_ALLOWED.phrase:
            exc = HTTPException(405, f"This endpoint does not take that method: {asked}.", exc.headers)
    return error_response(exc)


def install(app: FastAPI) -> None:
    """Register the handlers. Call it before adding other middlewares: UnexpectedErrors belongs innermost."""
    app.add_exception_handler(errors.EdgeLLMError, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_middleware(UnexpectedErrors)
