"""Routing traces: which experts each layer's router chose for each token, as CSV files, plain or gzip.

Lines that begin with `#` come first: the model and its shape, and one line a layer with the bytes of one expert there.
Then CSV: turn, phase (0 prompt, 1 decode), step, layer, slot (0: the largest weight), expert, weight, residency and
expert_bytes. The last three are ignored here, and written as zeros. The format is that of BigMoeOnEdge
(github.com/Helldez/BigMoeOnEdge, "route_trace v1").
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from edgellm.errors import InvalidTraceError

PROMPT, DECODE = 0, 1
MAX_LAYERS, MAX_EXPERTS = 1024, 4096
_FIRST_LINE = "# route_trace v1"
_COLUMNS = ["turn", "phase", "step", "layer", "slot", "expert", "weight", "residency", "expert_bytes"]


@dataclass(frozen=True, slots=True)
class Step:
    """One token's way through the model."""

    turn: int
    phase: int  # PROMPT or DECODE
    position: int
    experts: tuple[tuple[int, ...], ...]  # (layers, top-k), the largest weight first; empty where nothing was computed


@dataclass(frozen=True, slots=True)
class Shape:
    """What the routes belong to."""

    model: str
    architecture: str
    layers: int
    experts: int
    top_k: int
    expert_bytes: tuple[int, ...]  # (layers)

    def __post_init__(self) -> None:
        if not (1 <= self.layers <= MAX_LAYERS and 1 <= self.experts <= MAX_EXPERTS):
            raise InvalidTraceError(f"a model of {self.layers} layers with {self.experts} experts is not traced")
        if not 1 <= self.top_k <= self.experts:
            raise InvalidTraceError(f"{self.top_k} of {self.experts} experts cannot be chosen")
        if len(self.expert_bytes) != self.layers or min(self.expert_bytes) < 0:
            raise InvalidTraceError("every layer needs the size of its experts")
        if not re.fullmatch(r"\S+", self.model) or not re.fullmatch(r"\S+", self.architecture):
            raise InvalidTraceError("the model and its architecture are named without spaces")


@dataclass(frozen=True, slots=True)
class Trace:
    """Tokens in the order in which they were computed; those of a prompt were computed together."""

    shape: Shape
    steps: tuple[Step, ...]

    def phase(self, phase: int) -> tuple[Step, ...]:
        """The steps of one phase."""
        return tuple(step for step in self.steps if step.phase == phase)


def read_trace(path: Path) -> Trace:
    """A trace from a file. Raises InvalidTraceError, and OSError if the file cannot be opened."""
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        try:
            header = []
            for line in file:
                if not line.startswith("#"):
                    break
                header.append(line)
            else:
                line = ""
            if line.strip().split(",") != _COLUMNS:
                raise InvalidTraceError(f"{path.name}: not a routing trace, there is no line of column names")
            shape = _read_shape(header)
            return Trace(shape, _read_steps(shape, csv.reader(file)))
        except (InvalidTraceError, UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InvalidTraceError(f"{path.name}: {str(error).removeprefix(f'{path.name}: ')}") from error


class TraceWriter(AbstractContextManager["TraceWriter"]):
    """Writes a trace step by step, compressed if the name ends in `.gz`. Raises OSError."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self._shape = shape
        self._file: TextIO
        if path.name.endswith(".gz"):
            self._file = gzip.open(path, "wt", encoding="utf-8", newline="")  # noqa: SIM115 (closed by close)
        else:
            self._file = path.open("w", encoding="utf-8", newline="")
        self._file.write(f"{_FIRST_LINE}\n# model={shape.model} arch={shape.architecture} n_layer={shape.layers} ")
        self._file.write(f"n_expert={shape.experts} n_expert_used={shape.top_k}\n")
        for layer, size in enumerate(shape.expert_bytes):
            self._file.write(f"# layer={layer} expert_bytes={size}\n")
        self._file.write(",".join(_COLUMNS) + "\n")

    def write(self, step: Step) -> None:
        """Append a step. Raises InvalidTraceError if it does not fit the shape."""
        _check_step(self._shape, step)
        rows = (
            f"{step.turn},{step.phase},{step.position},{layer},{slot},{expert},0,0,0\n"
            for layer, experts in enumerate(step.experts)
            for slot, expert in enumerate(experts)
        )
        self._file.write("".join(rows))

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def write_trace(path: Path, trace: Trace) -> None:
    """Write a whole trace."""
    with TraceWriter(path, trace.shape) as writer:
        for step in trace.steps:
            writer.write(step)


def _read_shape(header: Sequence[str]) -> Shape:
    if not header or header[0].strip() != _FIRST_LINE:
        raise InvalidTraceError(f"not a routing trace: it does not begin with `{_FIRST_LINE}`")
    named: dict[str, str] = {}
    sizes: dict[int, int] = {}
    for line in header[1:]:
        fields = dict(re.findall(r"(\w+)=(\S+)", line))
        if "layer" in fields:
            sizes[_number(fields["layer"])] = _number(fields.get("expert_bytes", ""))
        else:
            named |= fields
    missing = {"model", "arch", "n_layer", "n_expert", "n_expert_used"} - named.keys()
    if missing:
        raise InvalidTraceError(f"the header lacks {', '.join(sorted(missing))}")
    layers = _number(named["n_layer"])
    if sizes.keys() - range(layers):
        raise InvalidTraceError("the header describes layers that the model does not have")
    return Shape(
        model=named["model"],
        architecture=named["arch"],
        layers=layers,
        experts=_number(named["n_expert"]),
        top_k=_number(named["n_expert_used"]),
        expert_bytes=tuple(sizes.get(layer, 0) for layer in range(min(layers, MAX_LAYERS + 1))),
    )


def _read_steps(shape: Shape, rows: Iterable[list[str]]) -> tuple[Step, ...]:
    found: dict[tuple[int, int, int], list[list[int]]] = {}
    for row in rows:
        if len(row) != len(_COLUMNS):
            raise InvalidTraceError(f"a row has {len(row)} columns: {','.join(row)[:80]}")
        turn, phase, position, layer, slot, expert = map(_number, row[:6])
        if layer >= shape.layers:
            raise InvalidTraceError(f"there is no layer {layer}")
        chosen = found.setdefault((turn, phase, position), [[] for _ in range(shape.layers)])[layer]
        if slot != len(chosen):
            raise InvalidTraceError(f"step {position}, layer {layer}: slot {slot} stands where {len(chosen)} should")
        chosen.append(expert)
    steps = tuple(Step(*key, tuple(map(tuple, experts))) for key, experts in found.items())
    for step in steps:
        _check_step(shape, step)
    return steps


def _check_step(shape: Shape, step: Step) -> None:
    where = f"step {step.position}"
    if step.phase not in (PROMPT, DECODE):
        raise InvalidTraceError(f"{where}: there is no phase {step.phase}")
    if len(step.experts) != shape.layers:
        raise InvalidTraceError(f"{where}: {len(step.experts)} layers instead of {shape.layers}")
    for layer, experts in enumerate(step.experts):
        if len(experts) > shape.top_k or len(set(experts)) != len(experts):
            raise InvalidTraceError(f"{where}, layer {layer}: experts are named twice, or too many")
        if any(not 0 <= expert < shape.experts for expert in experts):
            raise InvalidTraceError(f"{where}, layer {layer}: experts are numbered from 0 to {shape.experts - 1}")


def _number(text: str) -> int:
    if not re.fullmatch(r"\d{1,15}", text):
        raise InvalidTraceError(f"{text[:40]!r} is no number")
    return int(text)
