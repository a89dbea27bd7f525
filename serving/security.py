"""What stands between the socket and the application: pure ASGI middlewares, put together by `wrap`.

A local server's enemies are web pages that the user visits. A page can send requests to 127.0.0.1, with a Host header
of its own (DNS rebinding) or, without asking first, as a form or text/plain POST. So: the Host must be ours; a request
with a foreign Origin is refused whatever its method (clients that are not browsers send none); and a body must be
JSON, which a page cannot send without a preflight. Uploads are forms, which it can: those of a browser must have an
Origin, which has been checked. Desktop programs built on a browser send an Origin of their own
(such as vscode-webview://...) and need `cors_origin`.
"""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgellm.config import Settings
from serving.errors import refuse
from serving.hosts import HostRule, same_origin
from serving.keys import ApiKeys, load_api_keys

OPEN_PATHS = frozenset({"/health"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_JSON_TYPE = re.compile(r"application/(?:[a-z0-9.+-]+\+)?json(?:\s*;.*)?", re.IGNORECASE)
_DIGITS = re.compile(r"[0-9]{1,20}")
_FORM_TYPE = re.compile(r"multipart/form-data\s*;.*", re.IGNORECASE)
_UPLOADS = frozenset({("POST", "/v1/files")})
_FORM_BYTES = 1 << 18  # what a form may have around its file
_BODY_METHODS = frozenset({"POST", "PUT", "PATCH", "DELETE"})


def _values(scope: Scope, name: bytes) -> list[str]:
    """All values of a header, `name` in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


class RequestId:
    """Gives every answer an `x-request-id`: the client's own if it sent a sound one. Also scope["state"]."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _values(scope, b"x-request-id")
        sound = len(given) == 1 and _REQUEST_ID.fullmatch(given[0])
        request_id = given[0] if sound else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class HostCheck:
    """Refuses requests that are not addressed to this server, against DNS rebinding. No websockets either.

    403, not 421: clients that see 421 may send the request again on another connection, to no avail.
    """

    def __init__(self, app: ASGIApp, rule: HostRule) -> None:
        self._app = app
        self._rule = rule

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no websockets here"})
            return
        if scope["type"] == "http":
            hosts = _values(scope, b"host")
            if len(hosts) != 1:
                response = refuse(400, "The request must have exactly one Host header.", "invalid_host")
                await response(scope, receive, send)
                return
            if not self._rule.accepts(hosts[0]):
                text = "The Host header names a host that is not served here; allow it with --allowed-host."
                await refuse(403, text, "host_not_allowed")(scope, receive, send)
                return
        await self._app(scope, receive, send)


class OriginCheck:
    """Refuses requests that a foreign web page sends, of any method. See the module's docstring."""

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...]) -> None:
        self._app = app
        self._all = "*" in allowed
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._all:
            for origin in _values(scope, b"origin"):
                if origin not in self._allowed and not same_origin(origin, _values(scope, b"host")[0]):
                    text = "Web pages of this origin may not call this server; allow it with --cors-origin."
                    await refuse(403, text, "origin_not_allowed")(scope, receive, send)
                    return
        await self._app(scope, receive, send)


class KeyCheck:
    """Demands `Authorization: Bearer <key>`, but not on OPEN_PATHS."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            problem = self._problem(_values(scope, b"authorization"))
            if problem is not None:
                headers = {"www-authenticate": 'Bearer realm="edgellm"'}
                await refuse(401, problem, "invalid_api_key", headers=headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, headers: list[str]) -> str | None:
        if not headers:
            return "This server needs an API key: send it as 'Authorization: Bearer KEY'."
        scheme, _, key = headers[0].partition(" ")
        if len(headers) > 1 or scheme.lower() != "bearer" or not key.strip():
            return "The Authorization header is not of the form 'Bearer KEY'."
        return None if self._keys.accept(key.strip()) else "The API key is not one of this server's."


def _is_upload(scope: Scope) -> bool:
    return (scope["method"], scope["path"]) in _UPLOADS


class JsonOnly:
    """Refuses bodies of another content type than JSON with 415. A body without one is taken for JSON.

    Uploads must be forms instead.

    So is one that `curl -d` calls a form, unless a browser sent it: a web page could post a form without asking first.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in _BODY_METHODS and _has_body(scope):
            types = _values(scope, b"content-type")
            if _is_upload(scope):
                if len(types) != 1 or not _FORM_TYPE.fullmatch(types[0].strip()):
                    text = "The body must be a form, sent with 'Content-Type: multipart/form-data; boundary=...'."
                    await refuse(415, text, "unsupported_media_type")(scope, receive, send)
                    return
                if _from_browser(scope) and not _values(scope, b"origin"):
                    text = "A browser's upload must have an Origin header."
                    await refuse(403, text, "origin_not_allowed")(scope, receive, send)
                    return
            elif not types or (types == ["application/x-www-form-urlencoded"] and not _from_browser(scope)):
                # Some versions of FastAPI would not parse it otherwise.
                others = [header for header in scope["headers"] if header[0] != b"content-type"]
                scope["headers"] = [*others, (b"content-type", b"application/json")]
            elif len(types) > 1 or not _JSON_TYPE.fullmatch(types[0].strip()):
                text = "The body must be JSON, sent with 'Content-Type: application/json'."
                await refuse(415, text, "unsupported_media_type")(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _from_browser(scope: Scope) -> bool:
    return any(_values(scope, name) for name in (b"origin", b"referer", b"sec-fetch-site"))


def _has_body(scope: Scope) -> bool:
    length = _values(scope, b"content-length")
    return bool(_values(scope, b"transfer-encoding")) or (bool(length) and length[0].strip() not in ("", "0"))


class BodyLimit:
    """Refuses bodies of more than `limit_bytes` with 413, uploads of more than `upload_bytes`: at once if
    Content-Length says so, else as soon as that many have come. The rest is read and dropped by the server, so the
    client gets to see the answer."""

    def __init__(self, app: ASGIApp, limit_bytes: int, upload_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes
        self._upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit_bytes = self._upload_bytes if _is_upload(scope) else self._limit_bytes
        text = f"The request body is larger than this server takes ({limit_bytes} bytes)."
        refusal = refuse(413, text, "request_too_large")
        length = _values(scope, b"content-length")
        if length and _DIGITS.fullmatch(length[0].strip()) and int(length[0]) > limit_bytes:
            await refusal(scope, receive, send)
            return
        count, started, refused = 0, False, False

        async def counted_receive() -> Message:
            nonlocal count, refused
            message = await receive()
            count += len(message.get("body", b""))
            if count > limit_bytes and not started:
                if not refused:
                    refused = True
                    await refusal(scope, receive, send)
                # The application sees a client that has gone away, and stops.
                return {"type": "http.disconnect"}
            return message

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if not refused:
                started = True
                await send(message)

        try:
            await self._app(scope, counted_receive, guarded_send)
        except Exception:
            if not refused:
                raise


def wrap(app: ASGIApp, settings: Settings) -> ASGIApp:
    """`app` behind all of them, from the outside in:

    1. RequestId: refusals have an id too.
    2. HostCheck: nothing else is told to who asks for another host.
    3. CORS, only with `cors_origin`: preflights carry no key, and refusals further in must be readable to the page.
    4. OriginCheck.
    5. KeyCheck, only with `api_key_file`: before anything of the body is read.
    6. JsonOnly and 7. BodyLimit.

    Raises ConfigError if the key file is faulty.
    """
    inner: ASGIApp = JsonOnly(BodyLimit(app, settings.max_body_bytes, settings.max_file_bytes + _FORM_BYTES))
    if settings.api_key_file is not None:
        inner = KeyCheck(inner, load_api_keys(settings.api_key_file))
    inner = OriginCheck(inner, settings.cors_origin)
    if settings.cors_origin:
        inner = CORSMiddleware(
            inner,
            allow_origins=list(settings.cors_origin),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return RequestId(HostCheck(inner, HostRule(settings.host, settings.allowed_host)))
