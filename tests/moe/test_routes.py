"""Routing traces: what is written is what is read, and unsound files are refused with one exception."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgellm.errors import InvalidTraceError
from edgellm.moe.routes import DECODE, PROMPT, Shape, Step, Trace, TraceWriter, read_trace, write_trace
from tests.moe.traces import made_up, real_traces

HEAD = """# route_trace v1
# model=/models/a.gguf arch=qwen3moe n_layer=2 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=7
# layer=1 expert_bytes=200 dense_bytes=7
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
"""
ROWS = "0,0,0,0,0,3,0.7,0,100\n0,0,0,0,1,1,0.3,0,100\n0,1,1,0,0,2,0.5,1,0\n0,1,1,1,0,7,0.9,0,200\n"


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_a_written_trace_is_read_again(tmp_path: Path, name: str) -> None:
    trace = made_up(5, prompt=3, decoded=5)
    write_trace(tmp_path / name, trace)
    assert read_trace(tmp_path / name) == trace
    assert ((tmp_path / name).read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")


def test_the_format_is_that_of_the_published_traces(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEAD + ROWS)
    shape = Shape("/models/a.gguf", "qwen3moe", 2, 8, 2, (100, 200))
    steps = (Step(0, PROMPT, 0, ((3, 1), ())), Step(0, DECODE, 1, ((2,), (7,))))
    assert read_trace(path) == Trace(shape, steps)
    assert read_trace(path).phase(DECODE) == steps[1:]


@pytest.mark.parametrize("path", real_traces(), ids=lambda path: path.name)
def test_real_traces_are_read(path: Path) -> None:
    trace = read_trace(path)
    assert len(trace.phase(PROMPT)) > 20
    assert all(len(chosen) == trace.shape.top_k for step in trace.phase(DECODE) for chosen in step.experts)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text.removeprefix("# route_trace v1\n"),
        lambda text: text.replace("turn,", "round,"),
        lambda text: text.replace("n_expert_used=2", ""),
        lambda text: text.replace("n_expert_used=2", "n_expert_used=9"),
        lambda text: text.replace("n_layer=2", "n_layer=1"),
        lambda text: text.replace("n_layer=2", "n_layer=999999999"),
        lambda text: text.replace("n_expert=8", "n_expert=-8"),
        lambda text: text.replace("expert_bytes=100", "expert_bytes=many"),
        lambda text: text + "0,1,1\n",
        lambda text: text + "0,1,2,2,0,1,0,0,0\n",
        lambda text: text + "0,1,2,0,0,8,0,0,0\n",
        lambda text: text + "0,1,2,0,1,1,0,0,0\n",
        lambda text: text + "0,2,2,0,0,1,0,0,0\n",
        lambda text: text + "0,1,2,0,0,x,0,0,0\n",
        lambda text: text + "0,1,1,1,1,7,0,0,0\n",
        lambda text: text + "0,1,2,0,0,1,0,0,0\n0,1,2,0,1,2,0,0,0\n0,1,2,0,2,3,0,0,0\n",
    ],
)
def test_unsound_files_are_refused(tmp_path: Path, spoil: Callable[[str], str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(spoil(HEAD + ROWS))
    with pytest.raises(InvalidTraceError, match=r"^a\.csv: "):
        read_trace(path)


def test_files_that_are_no_text_or_cut_off_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress((HEAD + ROWS).encode())
    for name, data in [("a.csv", b"\xff\xfe\x00"), ("b.csv.gz", whole[:-12]), ("c.csv.gz", b"no gzip"), ("d.csv.gz", whole[:60] + b"!" * 60)]:  # fmt: skip  # noqa: E501
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidTraceError, match=name):
            read_trace(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none.csv")


def test_the_writer_refuses_what_the_reader_would(tmp_path: Path) -> None:
    shape = Shape("a", "b", 2, 8, 2, (1, 1))
    fine = Step(0, DECODE, 0, ((1, 2), (3, 4)))
    with TraceWriter(tmp_path / "a.csv", shape) as writer:
        for experts in [((1, 2),), ((1, 1), ()), ((1, 2, 3), ()), ((8,), ())]:
            with pytest.raises(InvalidTraceError):
                writer.write(replace(fine, experts=experts))
        with pytest.raises(InvalidTraceError):
            writer.write(replace(fine, phase=2))
        writer.write(fine)
    assert read_trace(tmp_path / "a.csv").steps == (fine,)
    with pytest.raises(InvalidTraceError):
        Shape("a model", "b", 2, 8, 2, (1, 1))
