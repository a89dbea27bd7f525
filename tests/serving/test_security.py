"""Hosts, origins, keys, content types and body limits, over raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from hypothesis import given
from hypothesis import strategies as st

from edgellm.config import Settings
from edgellm.errors import ConfigError
from serving.errors import install
from serving.hosts import HostRule, same_origin, split_authority
from serving.keys import ApiKeys, load_api_keys
from serving.metrics import CountRequests, Metrics
from serving.security import wrap
from serving.streaming import run_until_disconnect, sse_response
from tests.serving.live import Answer, Connection, serve

LIMIT = 2048


@contextlib.contextmanager
def running(**fields: Any) -> Iterator[int]:
    """An application behind `wrap`: /echo says how many bytes came; /health."""
    app = FastAPI()
    install(app)
    app.state.echoed = 0

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, Any]:
        app.state.echoed += 1
        body = await request.body()
        return {"bytes": len(body), "id": request.state.request_id}

    @app.post("/json")
    async def parsed(body: dict[str, Any]) -> dict[str, Any]:
        return body

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    with serve(wrap(app, Settings(max_body_bytes=LIMIT, **fields))) as port:
        yield port


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running() as port:
        yield port


def ask(port: int, method: str, path: str, headers: list[tuple[str, str]], body: bytes = b"") -> Answer:
    with Connection(port) as connection:
        connection.send(method, path, headers, body)
        return connection.answer()


def post(port: int, *headers: tuple[str, str], path: str = "/echo", body: bytes = b"{}") -> Answer:
    base = [("Host", "localhost"), ("Content-Length", str(len(body)))]
    return ask(port, "POST", path, [*base, *headers], body)


JSON = ("Content-Type", "application/json")


class TestHosts:
    @pytest.mark.parametrize(
        ("header", "pair"),
        [
            ("localhost", ("localhost", "")),
            ("LocalHost:8000", ("localhost", "8000")),
            ("localhost.", ("localhost", "")),
            ("[::1]:80", ("::1", "80")),
            ("127.0.0.1", ("127.0.0.1", "")),
            ("::1", None),
            ("[::1", None),
            ("[zz]", None),
            ("[1.2.3.4:]", None),
            ("a@localhost", None),
            ("localhost:port", None),
            ("localhost:", None),
            ("", None),
            (".", None),
            ("a b", None),
            ("a/b", None),
            ("localhost\n", ("localhost", "")),
        ],
    )
    def test_split(self, header: str, pair: tuple[str, str] | None) -> None:
        assert split_authority(header) == pair

    @given(st.text())
    def test_any_header_is_judged(self, header: str) -> None:
        assert isinstance(HostRule("127.0.0.1").accepts(header), bool)
        same_origin(header, "localhost")
        same_origin(f"http://{header}", header)

    @pytest.mark.parametrize(
        ("bind", "allowed", "header", "accepted"),
        [
            ("127.0.0.1", (), "localhost:8000", True),
            ("127.0.0.1", (), "chat.localhost", True),
            ("127.0.0.1", (), "127.0.0.2", True),
            ("127.0.0.1", (), "[::1]", True),
            ("127.0.0.1", (), "[::ffff:127.0.0.1]", False),
            ("127.0.0.1", (), "192.168.0.7", False),
            ("127.0.0.1", (), "evil.example", False),
            ("127.0.0.1", (), "localhost.evil.example", False),
            ("127.0.0.1", (), "127.0.0.1.evil.example", False),
            ("127.0.0.1", (), "evillocalhost", False),
            ("192.168.0.7", (), "192.168.0.7:8000", True),
            ("board.lan", (), "BOARD.lan", True),
            ("fd00::7", (), "[fd00::7]:8000", True),
            ("0.0.0.0", (), "192.168.0.7:8000", True),
            ("::", (), "[fd00::7]", True),
            ("0.0.0.0", (), "evil.example", False),
            ("127.0.0.1", ("board.lan:8000",), "board.lan", True),
            ("127.0.0.1", ("*.lan",), "board.lan", True),
            ("127.0.0.1", ("*.lan",), "lan", False),
            ("127.0.0.1", ("*.lan",), "boardlan", False),
            ("127.0.0.1", ("*",), "anything.example", True),
            ("127.0.0.1", ("*",), "not a host", False),
        ],
    )
    def test_rule(self, bind: str, allowed: tuple[str, ...], header: str, accepted: bool) -> None:
        assert HostRule(bind, allowed).accepts(header) is accepted

    @pytest.mark.parametrize(
        ("origin", "host", "same"),
        [
            ("http://localhost:8000", "localhost:8000", True),
            ("http://localhost", "localhost:80", True),
            ("https://box.lan", "box.lan", True),
            ("http://localhost:3000", "localhost:8000", False),
            ("http://evil.example", "localhost", False),
            ("null", "localhost", False),
            ("http://[::1]:8000", "[::1]:8000", True),
            ("file://localhost", "localhost", False),
            ("http://[", "localhost", False),
        ],
    )
    def test_same_origin(self, origin: str, host: str, same: bool) -> None:
        assert same_origin(origin, host) is same

    def test_refusals(self, port: int) -> None:
        answer = ask(port, "GET", "/health", [("Host", "evil.example")])
        assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")
        assert "evil" not in answer.error["message"]
        assert ask(port, "GET", "/health", [("Host", "localhost:1")]).status == 200

    @pytest.mark.parametrize("headers", [[], [("Host", "localhost"), ("Host", "evil.example")], [("Host", "")]])
    def test_missing_empty_or_two(self, port: int, headers: list[tuple[str, str]]) -> None:
        assert ask(port, "GET", "/health", headers).status in (400, 403)

    def test_http_1_0_without_host(self, port: int) -> None:
        with Connection(port) as connection:
            connection.socket.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert connection.head().status == 400


class TestOrigins:
    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "file://"])
    def test_foreign_pages_are_refused(self, port: int, origin: str) -> None:
        for content_type in ("text/plain", "application/json"):
            answer = post(port, ("Origin", origin), ("Content-Type", content_type))
            assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
        assert ask(port, "GET", "/health", [("Host", "localhost"), ("Origin", origin)]).status == 403

    def test_our_own_page_is_served(self, port: int) -> None:
        assert post(port, ("Origin", "http://localhost"), JSON).status == 200

    def test_cors_is_off(self, port: int) -> None:
        headers = [("Host", "localhost"), ("Origin", "http://a.example"), ("Access-Control-Request-Method", "POST")]
        answer = ask(port, "OPTIONS", "/echo", headers)
        assert answer.status == 403
        assert answer.header("access-control-allow-origin") is None

    def test_cors_on(self, tmp_path: Path) -> None:
        key_file = tmp_path / "keys"
        key_file.write_text("secret-1\n")
        key_file.chmod(0o600)
        origin = ("Origin", "http://a.example")
        with running(cors_origin=("http://a.example",), api_key_file=key_file) as port:
            asked = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "authorization")]
            answer = ask(port, "OPTIONS", "/echo", [("Host", "localhost"), origin, *asked])
            assert answer.status == 200
            assert answer.header("access-control-allow-origin") == "http://a.example"
            assert answer.header("access-control-allow-headers") == "authorization"
            answer = post(port, origin, JSON)  # no key: refused, but the page can read why
            assert answer.status == 401
            assert answer.header("access-control-allow-origin") == "http://a.example"
            assert post(port, origin, JSON, ("Authorization", "Bearer secret-1")).status == 200
            assert post(port, ("Origin", "http://b.example"), JSON).status == 403

    def test_cors_for_all(self) -> None:
        with running(cors_origin=("*",)) as port:
            assert post(port, ("Origin", "http://b.example"), JSON).header("access-control-allow-origin") == "*"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# ours\n\n  key-one  \nkey#two\n")
    path.chmod(0o600)
    with running(api_key_file=path) as port:
        yield port


class TestKeys:
    @pytest.mark.parametrize("value", ["Bearer key-one", "bearer key#two", "Bearer   key-one"])
    def test_accepted(self, locked: int, value: str) -> None:
        assert post(locked, JSON, ("Authorization", value)).status == 200

    @pytest.mark.parametrize(
        "headers",
        [
            [],
            [("Authorization", "Bearer key-on")],
            [("Authorization", "Bearer key-one2")],
            [("Authorization", "Bearer ")],
            [("Authorization", "key-one")],
            [("Authorization", "Basic key-one")],
            [("Authorization", "Bearer # ours")],
            [("Authorization", "Bearer \xff")],
            [("Authorization", "Bearer key-one"), ("Authorization", "Bearer key-one")],
        ],
    )
    def test_refused(self, locked: int, headers: list[tuple[str, str]]) -> None:
        answer = post(locked, JSON, *headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert (answer.header("www-authenticate") or "").startswith("Bearer")
        assert b"key-one" not in answer.body

    def test_health_is_open_and_nothing_else(self, locked: int) -> None:
        host = [("Host", "localhost")]
        assert ask(locked, "GET", "/health", host).status == 200
        for path in ("/docs", "/openapi.json", "/nowhere", "/health/", "//health"):
            assert ask(locked, "GET", path, host).status == 401

    @pytest.mark.parametrize(
        ("content", "words"),
        [(b"", "no key"), (b"# only\n", "no key"), (b"a b\n", "line 1"), (b"\xff", "text"), ("é\n".encode(), "line 1")],
    )
    def test_faulty_files(self, tmp_path: Path, content: bytes, words: str) -> None:
        path = tmp_path / "keys"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match=words) as caught:
            load_api_keys(path)
        assert "a b" not in str(caught.value)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="No such file"):
            load_api_keys(tmp_path / "none")
        with pytest.raises(ConfigError):
            load_api_keys(tmp_path)

    def test_open_file_is_warned_of(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "keys"
        path.write_text("k\n")
        path.chmod(0o600)
        assert len(load_api_keys(path)) == 1
        assert not caplog.records
        path.chmod(0o644)
        with caplog.at_level(logging.WARNING):
            load_api_keys(path)
        assert "chmod 600" in caplog.text

    @given(st.lists(st.text(min_size=1), max_size=4), st.text())
    def test_only_the_keys_themselves(self, keys: list[str], other: str) -> None:
        known = ApiKeys(keys)
        assert all(known.accept(key) for key in keys)
        assert known.accept(other) is (other in keys)


class TestBodies:
    @pytest.mark.parametrize(
        "kind",
        ["text/plain", "multipart/form-data; boundary=x", "application/jsonx", ""],
    )
    def test_other_types_are_refused(self, port: int, kind: str) -> None:
        answer = post(port, ("Content-Type", kind))
        assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")

    @pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/x+json"])
    def test_json_is_taken(self, port: int, kind: str) -> None:
        assert post(port, ("Content-Type", kind), path="/json", body=b'{"a":1}').body == b'{"a":1}'

    def test_what_curl_calls_a_form_is_taken_for_json(self, port: int) -> None:
        form = ("Content-Type", "application/x-www-form-urlencoded")
        assert post(port, form, path="/json", body=b'{"a":1}').body == b'{"a":1}'

    @pytest.mark.parametrize("sign", ["Referer", "Sec-Fetch-Site"])
    def test_a_form_from_a_browser_is_refused(self, port: int, sign: str) -> None:
        form = ("Content-Type", "application/x-www-form-urlencoded")
        assert post(port, form, (sign, "http://evil.example")).status == 415

    def test_no_type_is_taken_for_json(self, port: int) -> None:
        assert post(port, path="/json", body=b'{"a":1}').body == b'{"a":1}'

    def test_no_body_needs_no_type(self, port: int) -> None:
        assert post(port, ("Content-Type", "text/plain"), body=b"").status == 200

    def test_the_limit(self, port: int) -> None:
        assert post(port, JSON, body=b"x" * LIMIT).status == 200
        answer = post(port, JSON, body=b"x" * (LIMIT + 1))
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert str(LIMIT) in answer.error["message"]

    def test_a_large_body_leaves_the_connection_usable(self, port: int) -> None:
        size = 3_000_000
        with Connection(port) as connection:
            for _ in range(2):
                headers = [("Host", "localhost"), JSON, ("Content-Length", str(size))]
                connection.send("POST", "/echo", headers, b"x" * size)
                assert connection.answer().status == 413
            connection.send("GET", "/health", [("Host", "localhost")])
            assert connection.answer().status == 200

    def test_refused_before_the_body_comes(self, port: int) -> None:
        with Connection(port) as connection:
            connection.send("POST", "/echo", [("Host", "localhost"), JSON, ("Content-Length", str(1 << 40))])
            assert connection.answer().status == 413

    @pytest.mark.parametrize("path", ["/echo", "/json"])
    def test_chunked_bodies_are_counted(self, port: int, path: str) -> None:
        with Connection(port) as connection:
            for count, status in [(1, (200, 400)), (8, (413,)), (1, (200, 400))]:
                connection.send("POST", path, [("Host", "localhost"), JSON, ("Transfer-Encoding", "chunked")])
                for _ in range(count):
                    connection.socket.sendall(b"200\r\n" + b"x" * 512 + b"\r\n")
                connection.socket.sendall(b"0\r\n\r\n")
                assert connection.answer().status in status

    def test_endless_body_is_refused_in_the_middle(self, port: int) -> None:
        with Connection(port) as connection:
            connection.send("POST", "/echo", [("Host", "localhost"), JSON, ("Transfer-Encoding", "chunked")])
            for _ in range(8):
                connection.socket.sendall(b"200\r\n" + b"x" * 512 + b"\r\n")
            assert connection.answer().status == 413


class TestRequestId:
    def test_made_up(self, port: int) -> None:
        answer = post(port, JSON)
        found = answer.header("x-request-id")
        assert found is not None
        assert found.startswith("req_")
        assert found.encode() in answer.body
        assert post(port, JSON).header("x-request-id") != found

    def test_the_clients_own(self, port: int) -> None:
        assert post(port, JSON, ("X-Request-Id", "abc-1")).header("x-request-id") == "abc-1"

    @pytest.mark.parametrize("given_id", ["a b", "x" * 129, "a\xffb", "<script>"])
    def test_unsound_ones_are_replaced(self, port: int, given_id: str) -> None:
        assert (post(port, JSON, ("X-Request-Id", given_id)).header("x-request-id") or "").startswith("req_")

    def test_refusals_have_one(self, port: int) -> None:
        assert ask(port, "GET", "/", [("Host", "evil.example")]).header("x-request-id")
        assert ask(port, "GET", "/nowhere", [("Host", "localhost")]).header("x-request-id")


def test_a_client_that_goes_away_is_noticed_through_all_of_them(tmp_path: Path) -> None:
    begun, ended = threading.Event(), threading.Event()
    app = FastAPI()
    install(app)

    async def events() -> AsyncIterator[bytes]:
        begun.set()
        try:
            await asyncio.Event().wait()
            yield b"{}"
        finally:
            ended.set()

    @app.post("/stream")
    async def stream(body: dict[str, Any]) -> Response:
        return sse_response(events())

    @app.post("/plain")
    async def plain(request: Request, body: dict[str, Any]) -> Response:
        return Response(await run_until_disconnect(request, anext(events())))

    keys = tmp_path / "keys"
    keys.write_text("k\n")
    keys.chmod(0o600)
    settings = Settings(api_key_file=keys, cors_origin=("http://a.example",))
    with serve(CountRequests(wrap(app, settings), Metrics(lambda: []))) as port:
        for path in ("/stream", "/plain"):
            begun.clear()
            ended.clear()
            with Connection(port) as connection:
                headers = [("Host", "localhost"), JSON, ("Authorization", "Bearer k"), ("Content-Length", "2")]
                connection.send("POST", path, [*headers, ("Origin", "http://a.example")], b"{}")
                assert begun.wait(10)
                assert not ended.is_set()
            assert ended.wait(10)


def test_websockets_are_refused(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(
            b"GET /echo HTTP/1.1\r\nHost: evil.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert raw.recv(100).split()[1] in (b"400", b"403")
