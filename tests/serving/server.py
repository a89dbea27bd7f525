"""The command `edgellm serve` as a process of its own, on a free port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

EDGELLM = Path(sys.executable).with_name("edgellm")
START_S = 60.0  # generous: the machine may be busy with other tests
_POLL_S = 0.02
_URL = re.compile(r"on\s+(http://\S+)\s+\(API:")


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without its settings, with the state directory `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGELLM_")}
    plain = {"EDGELLM_HOME": str(home), "NO_COLOR": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    # One thread: several that wait for each other spin, which takes ages where other work has the cores.
    return {**kept, **plain, "EDGELLM_THREADS": "1", **(extra or {})}


def run_edgellm(
    home: Path, *arguments: str, stdin: str | bytes = "", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; output is decoded as UTF-8."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [EDGELLM, *arguments], input=data, capture_output=True, env=environment(home, env), timeout=START_S
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@dataclass
class Server:
    """A running server. `url` has no slash at its end."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    home: Path

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    @property
    def api(self) -> str:
        """What OpenAI's client takes as base_url."""
        return f"{self.url}/v1"

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=START_S)

    def post(self, path: str, body: object = None, *, timeout: float = START_S, **more: object) -> httpx.Response:
        """POST `body` as JSON, or `content=` as it is."""
        if body is not None:
            more["json"] = body
        return httpx.post(self.url + path, timeout=timeout, **more)  # type: ignore[arg-type]

    def delete(self, path: str) -> httpx.Response:
        return httpx.delete(self.url + path, timeout=START_S)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry `labels`. 0 if there are none."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            match = re.fullmatch(r"([a-z_]+)(?:\{(.*)\})? (\S+)", line)
            if match and match[1] == name:
                found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                if labels.items() <= found.items():
                    total += float(match[3])
        return total

    def assert_alive(self) -> None:
        """It still runs, answers, and has logged no traceback."""
        assert self.process.poll() is None, self.log.read_text()
        assert self.get("/health").json()["status"] == "ok"
        assert "Traceback" not in self.log.read_text()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit status."""
        return self.process.wait(START_S)


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = START_S) -> None:
    """Poll until `condition()` is true. Fails after a time that no sound machine needs."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {limit_s:g} s: {what}")
        time.sleep(_POLL_S)


def _read_url(process: subprocess.Popen[bytes], log: Path) -> str:
    found: list[str] = []

    def ready() -> bool:
        match = _URL.search(log.read_text())
        if match:
            found.append(match[1])
        elif process.poll() is not None:
            raise AssertionError(f"the server ended with status {process.returncode}:\n{log.read_text()}")
        return bool(match)

    wait_until(ready, "the server says where it listens")
    return found[0]


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=START_S).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def serving(
    home: Path, *arguments: str, env: Mapping[str, str] | None = None, guard: str | None = "off"
) -> Iterator[Server]:
    """A server that is ready to answer; killed in the end if it has not stopped by itself.

    `guard` is off but in the tests that are about it: no other test may depend on what a classifier makes of its
    texts. None: the server's own default.
    """
    arguments = arguments if guard is None else ("--guard", guard, *arguments)
    home.mkdir(parents=True, exist_ok=True)
    log = home / "server.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [EDGELLM, "serve", "--port", "0", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment(home, env),
        )
    try:
        url = _read_url(process, log)
        wait_until(lambda: _answers(url), "the server answers")
        yield Server(process, url, log, home)
    finally:
        process.kill()
        process.wait()
