"""The process that renders one chat template. Run by template_process; imports Jinja and the standard library alone.

A model's template is a program by a stranger. Jinja's sandbox is the first fence; this process, without environment,
descriptors, files or children of its own, with limits on memory and processor time, is the second.

Protocol, both ways: a length (4 bytes, big endian), then JSON. In: first `{"source", "bos_token", "eos_token",
"timeout_s", "memory_bytes", "output_bytes"}`, then one `{"variables"}` for each render. Out: `{"ready"}` once Jinja is
loaded, `{"compiled"}`, then `{"text"}`; `{"error"}` in place of the last two. The end of input ends the process.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, BinaryIO, NoReturn

if __name__ == "__main__":
    sys.path.extend(sys.argv[1:])  # started without `site`, for speed: where Jinja lives comes as an argument

import jinja2
import jinja2.constants  # Jinja imports this and jinja2.debug late, when no file can be opened any more
import jinja2.debug
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

Message = dict[str, Any]

for _codec in ("unicode_escape", "ascii", "latin-1"):  # as late, for string literals and for `encode` in templates
    codecs.lookup(_codec)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model wrote, for training; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own filter escapes HTML and sorts keys."""
    pair = None if separators is None else (str(separators[0]), str(separators[1]))
    return json.dumps(value, ensure_ascii=bool(ensure_ascii), indent=indent, separators=pair, sort_keys=bool(sort_keys))


def _strftime_now(form: str) -> str:
    return time.strftime(form)


def make_environment() -> jinja2.Environment:
    """The environment that Hugging Face's templates are written for, sandboxed."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols], cache_size=0
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def render(template: jinja2.Template, variables: Message, output_bytes: int) -> Message:
    """`{"text"}`, or `{"error"}` if that many bytes do not hold the output."""
    parts: list[str] = []
    size = 0
    for part in template.generate(variables):
        size += len(part) if part.isascii() else len(part.encode("utf-8", "surrogatepass"))
        if size > output_bytes:
            return {"error": f"tried to write more than {output_bytes} bytes"}
        parts.append(part)
    return {"text": "".join(parts)}


def guarded(work: Callable[[], Message], memory_bytes: int) -> Message:
    """The result of `work`, or `{"error"}` with what to tell the user."""
    try:
        return work()
    except MemoryError:
        return {"error": f"tried to use more than {memory_bytes >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "tried to nest too deeply"}
    except jinja2.exceptions.SecurityError as error:
        return {"error": f"tried to reach Python internals: {error}"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"is not valid Jinja: {error.message} (line {error.lineno})"}
    except jinja2.UndefinedError as error:
        return {"error": f"uses what is not there: {error}"}
    except jinja2.TemplateError as error:
        return {"error": f"refused the messages: {error}"}
    except Exception as error:  # whatever a template's expressions can raise
        return {"error": f"failed: {type(error).__name__}: {error}"}


def _read(stream: BinaryIO) -> Message | None:
    head = stream.read(4)
    if len(head) < 4:
        return None
    body = stream.read(struct.unpack(">I", head)[0])
    message: Message = json.loads(body)
    return message


def _write(stream: BinaryIO, message: Message) -> None:
    body = json.dumps(message).encode()
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


def _limit(memory_bytes: int) -> None:
    """No more memory than this, no files, no children. What the platform lacks is left out."""
    try:
        import resource
    except ImportError:
        return
    wanted = (("AS", memory_bytes), ("FSIZE", 0), ("CORE", 0), ("NPROC", 0), ("NOFILE", 3))
    for name, value in wanted:
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is not None:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(number, (value, value))


def _limit_time(timeout_s: float) -> None:
    """End this process if it computes for that long from now: the parent may be gone and unable to end it."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + timeout_s) + 1
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    job = _read(stdin)
    if job is None:
        return
    _write(stdout, {"ready": True})
    memory_bytes, timeout_s = int(job["memory_bytes"]), float(job["timeout_s"])
    _limit_time(timeout_s)
    _limit(memory_bytes)
    environment = make_environment()
    environment.globals.update(bos_token=job["bos_token"], eos_token=job["eos_token"])
    compiled: list[jinja2.Template] = []

    def compile_template() -> Message:
        compiled.append(environment.from_string(job["source"]))
        return {"compiled": True}

    _write(stdout, guarded(compile_template, memory_bytes))
    while compiled and (message := _read(stdin)) is not None:
        _limit_time(timeout_s)
        variables = message["variables"]
        _write(stdout, guarded(partial(render, compiled[0], variables, job["output_bytes"]), memory_bytes))


def main() -> None:
    """Serve until the input ends. Signals sent to the whole server are the server's to act on: it closes our input."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
