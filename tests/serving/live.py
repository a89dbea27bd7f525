"""An ASGI application on a real port, and a raw HTTP/1.1 client for what tidy clients never send."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn


@contextlib.contextmanager
def serve(app: Any) -> Iterator[int]:
    """Run `app` under uvicorn in a thread; yields the port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


class Connection:
    """One socket; requests go out byte for byte as they are given."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def send(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes = b"") -> None:
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        self.socket.sendall("\r\n".join(lines).encode("latin-1") + body)

    def head(self) -> Answer:
        status = int(self._file.readline().split()[1])
        headers = []
        while (line := self._file.readline().strip()) != b"":
            name, _, value = line.decode("latin-1").partition(":")
            headers.append((name.lower(), value.strip()))
        return Answer(status, headers, b"")

    def answer(self) -> Answer:
        """A whole answer, of either framing."""
        found = self.head()
        length = found.header("content-length")
        found.body = self._file.read(int(length)) if length is not None else b"".join(self.chunks())
        return found

    def chunks(self) -> Iterator[bytes]:
        """The chunks of a chunked body as they come, up to the last."""
        while size := int(self._file.readline(), 16):
            yield self._file.read(size)
            self._file.readline()
        self._file.readline()


def post(port: int, path: str, body: bytes, *headers: tuple[str, str]) -> Answer:
    """POST with Host, Content-Length and a JSON content type, on a connection of its own."""
    with Connection(port) as connection:
        own = [("Host", "127.0.0.1"), ("Content-Length", str(len(body))), ("Content-Type", "application/json")]
        connection.send("POST", path, [*own, *headers], body)
        return connection.answer()
