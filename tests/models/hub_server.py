"""A server that speaks the Hugging Face Hub's protocol on 127.0.0.1, and can misbehave in the ways networks do."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote

COMMIT = "c" * 40


@dataclass
class HubServer:
    """`files` maps "owner/repo" to {path: bytes}. The other fields make it misbehave."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None  # demanded as a Bearer token
    api_status: int = 200
    gated: bool = False
    statuses: list[int] = field(default_factory=list)  # answers to the next downloads
    cuts: list[int] = field(default_factory=list)  # bytes after which the next downloads break off
    wrong_hash: bool = False
    extra_bytes: int = 0
    ranges: bool = True  # whether Range is honoured
    small_files: bool = False  # not in large-file storage: a git blob id in place of a SHA-256
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    """(method, path, Range, Authorization) of every request"""

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def downloads(self) -> list[tuple[str, str | None]]:
        """(path, Range) of the requests for bytes."""
        return [(path, span) for method, path, span, _ in self.requests if method == "GET" and path.startswith("/cdn/")]

    def listing(self, repo: str) -> dict[str, object]:
        siblings = []
        for path, data in self.files[repo].items():
            digest = hashlib.sha256(b"?" if self.wrong_hash else data).hexdigest()
            blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            item: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": blob}
            if not self.small_files:
                item["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(item)
        return {
            "id": repo,
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away in mid-transfer are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.hub
        path = unquote(self.path.partition("?")[0])
        hub.requests.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        if hub.token and not path.startswith("/cdn/") and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._error(401, "RepoNotFound", "Repository not found")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._api(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            data = hub.files[match[1]][match[3]]
            self.send_response(302)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Location", f"http://localhost:{hub.port}/cdn/{match[1]}/{match[3]}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return self._bytes(hub.files[match[1]][match[2]])
        return self._error(404, "EntryNotFound", "Not found")

    do_HEAD = do_GET  # noqa: N815

    def _api(self, repo: str, revision: str | None) -> None:
        hub = self.hub
        if hub.gated:
            return self._error(403, "GatedRepo", "Access to this model is restricted")
        if repo not in hub.files:
            return self._error(404, "RepoNotFound", "Repository not found")
        if revision not in (None, "main", COMMIT):
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        if hub.api_status != 200:
            return self._error(hub.api_status, "", "Internal error")
        return self._send(200, json.dumps(hub.listing(repo)).encode())

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _bytes(self, data: bytes) -> None:
        hub = self.hub
        if hub.statuses and (status := hub.statuses.pop(0)) != 200:
            return self._error(status, "", "out of order")
        data += bytes(hub.extra_bytes)
        start, span = 0, self.headers.get("Range")
        if span and hub.ranges:
            start = int(span.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                return self._error(416, "", "range")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = len(data)
        if hub.cuts:
            end = min(end, start + hub.cuts.pop(0))
            self.close_connection = True
        self.wfile.write(data[start:end])
        return None
