"""Tool calls out of a model's answer, while it is being written.

Formats, told from the chat template by `detect_format`:
- hermes (Qwen, Hermes, SmolLM): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, anywhere, several times;
- mistral (up to v3): `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`;
- llama3: `{"name": ..., "parameters": {...}}` as the whole answer, more of them after `;`;
- json: one such object or a list of them as the whole answer, as a grammar forces it.
Not known: calls in XML (Qwen3-Coder) or as Python (Llama 4 pythonic).
"""

from __future__ import annotations

import enum
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edgellm.chat.call_scanner import CallScanner, Step

ToolCallFormat = Literal["hermes", "llama3", "mistral", "json"]

_LETTERS = string.ascii_letters + string.digits
_TAGS: dict[ToolCallFormat, str] = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]"}
_END_TAG = "</tool_call>"
_BLANKS = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments. Joined, the fragments are the JSON text as the model wrote it."""

    index: int
    fragment: str


ToolCallEvent = ContentDelta | ToolCallStart | ToolCallArguments


def new_call_id() -> str:
    """`call_` and 24 random letters and digits."""
    return "call_" + "".join(secrets.choice(_LETTERS) for _ in range(24))


def detect_format(template_source: str | None) -> ToolCallFormat:
    """The format that a chat template teaches its model; hermes if it teaches none, as the fallback prompt does."""
    source = template_source or ""
    if "<tool_call>" in source:
        return "hermes"
    if "[TOOL_CALLS]" in source:
        return "mistral"
    if "parameters" in source and ("<|python_tag|>" in source or "ipython" in source):
        return "llama3"
    return "hermes"


def lazy_patterns(format: ToolCallFormat) -> tuple[str, ...]:
    """Patterns (of C++'s std::regex) after which a lazy grammar takes over the answer; none for json.

    They match at the very end of the answer so far, never past the trigger: llama.cpp feeds the grammar what it has
    already let through, and ends the process if the grammar does not like that.
    """
    match format:
        case "hermes":
            return (r"(<tool_call>\n?)$",)
        case "mistral":
            return (r"(\[TOOL_CALLS\] ?)$",)
        case "llama3":
            return (r"^\s*(\{)$",)
        case _:
            return ()


class _State(enum.Enum):
    TEXT = enum.auto()  # content, which a tag may end
    OPEN = enum.auto()  # a call, or a list of them, is to begin
    CALL = enum.auto()  # inside a call's object
    CLOSE = enum.auto()  # behind it


class ToolCallParser:
    """Splits an answer into content and calls as it comes. How the text is cut into pieces makes no difference.

    Text that does not turn out to be a call is content, unchanged. A call counts once its name and the `{` of its
    arguments are there; when the text ends within the arguments they stay unfinished, as with OpenAI. Dropped are the
    tags, the object around the arguments, and blanks before, between and after calls (not those behind content).
    A call without arguments gets `{}`, but only behind a tag: in llama3 and json an object without them is an answer.
    """

    def __init__(
        self, format: ToolCallFormat, *, parallel: bool = True, new_id: Callable[[], str] = new_call_id
    ) -> None:
        """Without `parallel` the parser is `done` after the first call and drops what follows."""
        self._format = format
        self._tag = _TAGS.get(format)
        self._parallel = parallel
        self._new_id = new_id
        self._state = _State.TEXT if self._tag else _State.OPEN
        self._in_list = False
        self._match = ""  # the start of what may become the tag
        self._gap: str | None = ""  # blanks at the start or after a call; None within content
        self._raw: list[str] = []  # since the last thing that was certain: content, if it comes to nothing
        self._scanner = CallScanner()
        self._events: list[ToolCallEvent] = []
        self._arguments: list[str] = []
        self.calls = 0
        self.done = False

    def feed(self, text: str) -> list[ToolCallEvent]:
        """What has become certain with this piece of the answer."""
        at = 0
        while at < len(text) and not self.done:
            if self._state is _State.TEXT and not self._match and self._gap is None:
                start = text.find(self._tag[0], at) if self._tag else -1
                end = len(text) if start < 0 else start
                self._content(text[at:end])
                at = end
                if at == len(text):
                    break
            self._step(text[at])
            at += 1
        return self._taken()

    def finish(self) -> list[ToolCallEvent]:
        """What is left when the answer is complete."""
        if not self.done:
            if self._state is _State.TEXT:
                if self._match or not self.calls:
                    self._content(self._match)
            elif self._state is not _State.CLOSE and not self._scanner.started:
                if self.calls and "".join(self._raw).strip(_BLANKS) in (",", ";"):
                    self._raw = []  # the answer was cut between two calls of a list
                self._give_up()
            self._match, self._raw = "", []
            self.done = True
        return self._taken()

    def _taken(self) -> list[ToolCallEvent]:
        self._flush_arguments()
        events, self._events = self._events, []
        return events

    def _flush_arguments(self) -> None:
        if self._arguments:
            self._events.append(ToolCallArguments(self.calls - 1, "".join(self._arguments)))
            self._arguments.clear()

    def _content(self, text: str) -> None:
        if self._gap:
            text = self._gap + text
        self._gap = None
        if not text:
            return
        self._flush_arguments()
        last = self._events[-1] if self._events else None
        if isinstance(last, ContentDelta):
            self._events[-1] = ContentDelta(last.text + text)
        else:
            self._events.append(ContentDelta(text))

    def _give_up(self) -> None:
        """What looked like a call is none: it was content."""
        raw = "".join(self._raw)
        self._raw = []
        self._in_list = False
        self._scanner = CallScanner()
        self._state = _State.TEXT
        self._content(raw)

    def _step(self, char: str) -> None:
        match self._state:
            case _State.TEXT:
                self._step_text(char)
            case _State.OPEN:
                self._step_open(char)
            case _State.CALL:
                self._step_call(char)
            case _State.CLOSE:
                self._step_close(char)

    def _step_text(self, char: str) -> None:
        if self._gap is not None and not self._match and char in _BLANKS:
            self._gap += char
            return
        candidate = self._match + char
        tag = self._tag or ""
        while candidate and not tag.startswith(candidate):
            self._content(candidate[0])
            candidate = candidate[1:]
        self._match = candidate
        if candidate and candidate == tag:
            self._match = ""
            self._raw = [self._gap or "", tag]
            self._gap = None
            self._state = _State.OPEN

    def _step_open(self, char: str) -> None:
        if char == "{":
            self._raw.append(char)
            self._scanner = CallScanner()
            self._scanner.step(char)
            self._state = _State.CALL
        elif char in _BLANKS:
            self._raw.append(char)
        elif char == "[" and self._format in ("mistral", "json") and not self._in_list:
            self._raw.append(char)
            self._in_list = True
        else:
            self._give_up()
            self._step(char)

    def _step_call(self, char: str) -> None:
        scanner = self._scanner
        step = scanner.step(char)
        if not scanner.started:
            self._raw.append(char)
        match step:
            case Step.MORE:
                pass
            case Step.START:
                self._start(scanner.name)
                self._arguments.append(char)
            case Step.ARGUMENT:
                self._arguments.append(char)
            case Step.DONE:
                self._end_call(scanner)
            case Step.MALFORMED if scanner.started:  # too late to take it back: the call stands
                self._leave_call()
                self._step(char)
            case Step.MALFORMED:
                self._raw.pop()
                self._give_up()
                self._step(char)

    def _end_call(self, scanner: CallScanner) -> None:
        if not scanner.started:
            arguments = scanner.arguments
            if arguments is None and self._tag and not scanner.has_arguments:
                arguments = "{}"
            if not scanner.name or arguments is None:
                self._give_up()
                return
            self._start(scanner.name)
            self._arguments.append(arguments)
        self._leave_call()

    def _start(self, name: str) -> None:
        self._flush_arguments()
        self._events.append(ToolCallStart(self.calls, self._new_id(), name))
        self.calls += 1
        self._raw = []

    def _leave_call(self) -> None:
        self._raw = []
        self._scanner = CallScanner()
        self._state = _State.CLOSE
        self.done = not self._parallel

    def _step_close(self, char: str) -> None:
        """Behind a call: its end tag, or a comma or the end of the list, or `;`. Anything else is text."""
        raw = "".join(self._raw).lstrip(_BLANKS) + char
        if char in _BLANKS and len(raw) == 1:
            self._raw.append(char)
        elif self._in_list and raw in (",", "]"):
            self._raw = [","] if raw == "," else []
            if raw == ",":
                self._state = _State.OPEN
            else:
                self._after_calls()
        elif self._format == "llama3" and raw == ";":
            self._raw = [";"]
            self._state = _State.OPEN
        elif self._format == "hermes" and _END_TAG.startswith(raw):
            self._raw.append(char)
            if raw == _END_TAG:
                self._after_calls()
        else:
            again = "".join(self._raw) + char
            self._after_calls()
            for one in again:
                self._step(one)

    def _after_calls(self) -> None:
        self._raw = []
        self._in_list = False
        self._gap = ""
        self._state = _State.TEXT
