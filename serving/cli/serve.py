"""`edgellm serve`: the process, its socket, its signals and its log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn
from rich.console import Console
from rich.logging import RichHandler

from edgellm.config import Settings
from edgellm.errors import ConfigError
from serving.app import create_app
from serving.service import Service

_log = logging.getLogger("edgellm.serve")
_KEEP_ALIVE_S = 75  # longer than clients pool connections, so that they are the ones to close
_CUT_OFF_S = 5  # for streams to send their last event after they were cut off
_SWITCH_INTERVAL_S = 0.0005


def run_server(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT. Raises EdgeLLMError if it cannot start."""
    console = Console(stderr=True)
    configure_log(settings.log_level, console)
    # The engine thread comes back from llama.cpp for the GIL at every step: it must not wait 5 ms for it.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while loading; uvicorn takes over later
    with _bound_socket(settings) as sock, contextlib.closing(Service(settings)) as service:
        app = create_app(service)
        with console.status(f"Loading {service.models.default} ..."):
            if settings.guard != "off":
                service.guarding.load()
            service.start()
            service.start_tuning()
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(settings.grace_seconds) + _CUT_OFF_S,
            lifespan="off",
        )
        host, port = sock.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        name = f"[bold]{service.models.default}[/bold]"
        console.print(f"[bold]edgellm[/bold] serves {name} on {url}  (API: {url}/docs)", soft_wrap=True)
        _Server(config, service).run(sockets=[sock])
        loading = service.loading
    _log.info("stopped")
    if loading:  # the interpreter's end would pull the ground from under llama.cpp
        os._exit(0)


class _Server(uvicorn.Server):
    """uvicorn with signals that end the process with status 0, and streams that are told before they are cut off."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        again = self.should_exit
        super().handle_exit(sig, frame)
        if again:
            self.force_exit = True
        self._service.closing = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._service.active_requests:
            _log.info(
                "finishing %d requests, for at most %g s",
                self._service.active_requests,
                self._service.settings.grace_seconds,
            )
        self._service.tuning.begin_stop(self._service.settings.grace_seconds)
        cut = asyncio.get_running_loop().call_later(self._service.settings.grace_seconds, self._service.cut_off)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()


@contextlib.contextmanager
def _bound_socket(settings: Settings) -> Iterator[socket.socket]:
    """Bound before the model is loaded, so that a taken port is noticed at once; listened to when it is ready."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
        sock.set_inheritable(False)
        yield sock
    finally:
        sock.close()


def configure_log(level: str, console: Console) -> None:
    """edgellm's and uvicorn's messages go to `console`; plain lines where that is no terminal."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, rich_tracebacks=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("edgellm", "serving"):
        logging.getLogger(name).setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
