"""The parent's side of template_worker: starts it, talks to it under a time limit, ends it."""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from edgellm.errors import ChatTemplateError

MEMORY_BYTES = 512 << 20  # address space of a worker, the interpreter's own included
START_S = 30.0  # for the interpreter and Jinja to load; slow storage needs seconds
_WORKER = Path(__file__).with_name("template_worker.py")
_KEPT_VARIABLES = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


class TemplateUnusableError(ChatTemplateError):
    """The template does not compile, hangs or brings its process down: trying it on other messages is no use."""


class TemplateProcess:
    """One template in a worker of its own: started on first use, kept, replaced when it hangs or dies.

    Thread-safe; renders of the same template wait for each other. After `close` it raises ChatTemplateError.
    """

    def __init__(self, source: str, *, bos_token: str, eos_token: str, timeout_s: float, output_bytes: int) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._timeout_s = timeout_s
        self._output_bytes = output_bytes
        self._setup = _packed(
            {
                "source": source,
                "bos_token": bos_token,
                "eos_token": eos_token,
                "timeout_s": timeout_s,
                "memory_bytes": MEMORY_BYTES,
                "output_bytes": output_bytes,
            }
        )
        self._lock = threading.Lock()
        self._closed = False
        self._broken: str | None = None  # why the template does not compile

    @property
    def pid(self) -> int | None:
        """The worker's process id, while there is one."""
        process = self._process
        return None if process is None else process.pid

    @property
    def alive(self) -> bool:
        """Whether there is a worker that runs."""
        process = self._process
        return process is not None and process.poll() is None

    def render(self, variables: dict[str, Any]) -> str:
        """The template's output. Raises ChatTemplateError if it raises, or exceeds a limit."""
        try:
            request = _packed({"variables": variables})
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"The template's variables cannot be written as JSON: {error}") from None
        with self._lock:
            reply = self._ask(self._ready(), request, self._timeout_s)
            if (text := reply.get("text")) is None:
                raise ChatTemplateError(f"The chat template {reply.get('error')}")
            if not isinstance(text, str):
                raise ChatTemplateError("The chat template gave no text")
            return text

    def close(self) -> None:
        """End the worker. A render under way in another thread fails."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def _ready(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise TemplateUnusableError("The chat template is closed")
        if self._broken is not None:
            raise TemplateUnusableError(self._broken)
        process = self._process
        if process is not None and self.alive:
            return process
        self._end()
        self._process = process = _start()
        self._ask(process, self._setup, START_S)
        reply = self._ask(process, b"", self._timeout_s)
        if "compiled" not in reply:
            self._end()
            self._broken = f"The chat template {reply.get('error')}"
            raise TemplateUnusableError(self._broken)
        return process

    def _ask(self, process: subprocess.Popen[bytes], request: bytes, limit_s: float) -> dict[str, Any]:
        """Send a request, if any, and wait for the next reply; a worker that gives none in time is ended."""
        try:
            # JSON spells a character with at most 12 bytes (two escapes), for at least two bytes of output.
            most = 6 * self._output_bytes + (1 << 20)
            reply = json.loads(_exchange(process, request, time.monotonic() + limit_s, most))
        except TimeoutError:
            self._end()
            raise TemplateUnusableError(f"The chat template took longer than {limit_s:g} s") from None
        except (OSError, ValueError):
            self._end()
            what = "is closed" if self._closed else "ended its process: it used too much memory or time"
            raise TemplateUnusableError(f"The chat template {what}") from None
        if not isinstance(reply, dict):
            self._end()
            raise ChatTemplateError("The chat template gave no text")
        return reply

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _packed(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


def _start() -> subprocess.Popen[bytes]:
    """A worker with three descriptors, hardly any environment and its own session (a terminal's ^C passes it by)."""
    found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    places = {str(Path(spec.origin).parent.parent) for spec in found if spec is not None and spec.origin is not None}
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-X", "utf8", str(_WORKER), *sorted(places)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=environment,
        cwd="/",
        close_fds=True,
        start_new_session=True,
    )
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            os.set_blocking(stream.fileno(), False)
    return process


def _exchange(process: subprocess.Popen[bytes], data: bytes, deadline: float, most: int) -> bytes:
    """Write all of `data` and read one reply of at most `most` bytes. Raises TimeoutError, OSError."""
    if process.stdin is None or process.stdout is None:
        raise OSError("no pipes")
    received = bytearray()
    wanted = 4
    view = memoryview(data)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if view:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while len(received) < wanted:
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events and time.monotonic() >= deadline:
                raise TimeoutError
            for key, _ in events:
                if key.fileobj is process.stdin:
                    view = view[os.write(key.fd, view[: 1 << 16]) :]
                    if not view:
                        selector.unregister(process.stdin)
                    continue
                # Never past this reply: the next one may already be in the pipe.
                part = os.read(key.fd, min(wanted - len(received), 1 << 20))
                if not part:
                    raise OSError("the worker has ended")
                received += part
                if len(received) == 4 and wanted == 4:
                    wanted = 4 + struct.unpack(">I", received)[0]
                    if wanted > most:
                        raise OSError("the reply is too long")
    return bytes(received[4:])
