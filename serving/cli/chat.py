"""`edgellm chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from edgellm.chat.text import TextAssembler
from edgellm.config import Settings
from edgellm.engine.loaded import LoadedModel
from edgellm.engine.types import AdapterUse, ErrorEvent, Event, FinishEvent, GenerateRequest, SamplingParams
from edgellm.errors import ContextLengthError, EdgeLLMError
from guards import Guard, Turn
from serving.generation import token_budget
from serving.guarding import Judged
from serving.refusals import refusal
from serving.screening import is_refused
from serving.service import Service
from serving.wire.sampling import SEEDS, seed32

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How the model talks."""

    system: str | None
    temperature: float
    top_p: float
    max_tokens: int | None
    seed: int | None
    adapter: str | None = None  # the name of a loaded one


def run_chat(settings: Settings, options: ChatOptions) -> None:
    """Reads lines until the user leaves. Raises EdgeLLMError if the model cannot be loaded."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    console = Console()
    with contextlib.closing(Service(settings)) as service:
        with Console(stderr=True).status(f"Loading {service.models.default} ..."):
            guard = service.guarding.load() if settings.guard != "off" else None
            service.start()
        model, adapters = service.models.resolve(options.adapter)
        with service.models.use(model) as loaded:
            if sys.stdin.isatty():
                name = options.adapter or model.name
                console.print(f"[bold]{escape(name)}[/bold]  Ctrl-C stops an answer, /reset starts over, /exit leaves.")
            _Conversation(service, loaded, options, console, adapters, guard).run()


class _Conversation:
    def __init__(
        self,
        service: Service,
        loaded: LoadedModel,
        options: ChatOptions,
        console: Console,
        adapters: tuple[AdapterUse, ...],
        guard: Guard | None,
    ) -> None:
        self._service = service
        self._loaded = loaded
        self._options = options
        self._console = console
        self._adapters = adapters
        self._guard = guard
        self._start = [{"role": "system", "content": options.system}] if options.system else []
        self._messages: list[dict[str, Any]] = list(self._start)

    def run(self) -> None:
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line in ("/exit", "/quit", "/bye"):
                return
            if line in ("/reset", "/clear"):
                self._messages = list(self._start)
                self._console.print("[dim]The conversation starts over.[/dim]")
            elif line.startswith("/"):
                self._console.print("[dim]/reset starts over, /exit leaves.[/dim]")
            elif line:
                self._turn(line)

    def _turn(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        said: list[str] = []
        try:
            refused = self._refusal()
            if refused is not None:
                self._messages.pop()  # neither guard nor model reads it again
                sys.stdout.write(f"{refused}\n")
                return
            for text in self._answer():
                said.append(text)
                sys.stdout.write(text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pass  # what was said so far stands
        except ContextLengthError as error:
            self._messages.pop()
            self._console.print(f"[red]{escape(str(error))}[/red] /reset starts over.")
            return
        except EdgeLLMError as error:
            self._messages.pop()
            self._console.print(f"[red]{escape(str(error))}[/red]")
            return
        sys.stdout.write("\n")
        self._messages.append({"role": "assistant", "content": "".join(said)})

    def _refusal(self) -> str | None:
        """What is said instead of an answer where the guard lets none be given. Under `annotate` it says what it
        found."""
        if self._guard is None:
            return None
        settings = self._service.settings
        judged: Judged = None
        try:
            judged = self._guard.check_turns([Turn(each["role"], each["content"]) for each in self._messages])
        except Exception:
            _log.exception("the guard has failed on a text")
        if settings.guard == "annotate" and judged is not None and judged.unsafe:
            self._console.print(f"[dim]The guard holds this for unsafe ({judged.score:.2f}).[/dim]")
        return refusal(judged) if is_refused(settings.guard, settings.guard_on_error, judged) else None

    def _answer(self) -> Iterator[str]:
        loaded, options = self._loaded, self._options
        vocab = loaded.vocab
        text = self._service.template(loaded).render_sync(self._messages)
        add_special = not (vocab.adds_bos and text.startswith(vocab.special_piece(vocab.bos)))
        prompt = vocab.tokenize(text, add_special=add_special, parse_special=True)
        if len(prompt) >= loaded.context_tokens:
            raise ContextLengthError(len(prompt), loaded.context_tokens - 1)
        seed = seed32(options.seed) if options.seed is not None else secrets.randbelow(SEEDS)
        request = GenerateRequest(
            prompt=tuple(prompt),
            max_tokens=token_budget(options.max_tokens, len(prompt), loaded.context_tokens, "--max-tokens"),
            sampling=SamplingParams(temperature=options.temperature, top_p=options.top_p, seed=seed),
            adapters=self._service.models.scaled(self._adapters),
        )
        events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        ticket = self._service.engine.submit(loaded.runner, request, events.put)
        assembler = TextAssembler((), vocab.piece)
        try:
            while True:
                for event in events.get():
                    if isinstance(event, ErrorEvent):
                        raise event.error
                    if isinstance(event, FinishEvent):
                        yield assembler.finish()
                        return
                    yield assembler.feed(event.token)
        finally:
            ticket.cancel()
