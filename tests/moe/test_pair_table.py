"""The table of experts that follow one another: what it foresees, that both copies foresee the same, and its file."""

from __future__ import annotations

import logging
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm import _kernels
from edgellm.moe.pair_table import PairTable, read_table, state_bytes, write_table
from edgellm.moe.predictors import score
from edgellm.moe.routes import Trace
from tests.moe.traces import all_traces, made_up

COPIES = [PairTable, _kernels.PairTable]
TRACES = all_traces()
NAMES = [trace.shape.model.rpartition("/")[2] for trace in TRACES]


class Both:
    """Both copies side by side, as a predictor."""

    def __init__(self, layers: int, experts: int) -> None:
        self.copies = [copy(layers, experts) for copy in COPIES]
        self.experts = experts

    def predict(self, layer: int, count: int, token: int = 0) -> list[int]:
        python, native = (list(copy.predict(layer, self.experts, token)) for copy in self.copies)
        assert python == native
        return python[:count]

    def observe(self, layer: int, experts: Any) -> None:
        for copy in self.copies:
            copy.observe(layer, experts)

    def observe_step(self, layer: int, rows: Any) -> None:
        for copy in self.copies:
            copy.observe_step(layer, rows)

    def agree(self) -> None:
        python, native = (copy.state() for copy in self.copies)
        assert python == native


@pytest.mark.parametrize("trace", TRACES, ids=NAMES)
def test_both_copies_foresee_the_same_on_traces(trace: Trace) -> None:
    both = Both(trace.shape.layers, trace.shape.experts)
    score(trace, both)
    both.agree()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), layers=st.integers(1, 4), experts=st.integers(1, 9))
def test_both_copies_foresee_the_same_in_steps_of_any_width(seed: int, layers: int, experts: int) -> None:
    draw, both, layer = random.Random(seed), Both(layers, experts), 0
    for _ in range(60):
        used, tokens = draw.randint(0, experts), draw.choice([1, 1, 2, 5])
        both.observe_step(layer, [draw.sample(range(experts), used) for _ in range(tokens)])
        for coming in range(layers):
            for token in range(tokens + 1):
                both.predict(coming, experts, token)
        layer = (layer + 1) % layers if draw.random() < 0.9 else draw.randrange(layers)
    both.agree()


@pytest.mark.parametrize("copy", COPIES)
def test_counts_that_are_full_are_halved(copy: Any) -> None:
    table = copy(2, 4)
    for _ in range(300):
        table.observe(0, (0,))
        table.observe(1, (2, 3))
    near = table.state()[16:32]  # of layer 1, (expert before, expert)
    assert list(near) == [0, 0, 127 + 45, 127 + 45] + [0] * 12
    table.observe(0, (0,))
    assert set(table.predict(1, 2)) == {2, 3}


@pytest.mark.parametrize("copy", COPIES)
def test_frequencies_that_are_full_are_halved(copy: Any) -> None:
    table = copy(1, 2)
    table.restore(bytes(8) + (65535).to_bytes(2, "little") + (9).to_bytes(2, "little"))
    table.observe(0, (0,))
    assert table.state() == bytes(8) + (32768).to_bytes(2, "little") + (4).to_bytes(2, "little")


@pytest.mark.parametrize("copy", COPIES)
def test_both_layers_before_are_evidence_then_frequency(copy: Any) -> None:
    table = copy(3, 8)
    for _ in range(9):
        for route in ([0, 1, 2], [3, 1, 4]):  # what the middle layer uses is the same
            for layer, expert in enumerate(route):
                table.observe(layer, [expert])
    for first, last in ((0, 2), (3, 4)):
        table.observe(0, [first])
        table.observe(1, [1])
        assert table.predict(2, 1) == [last]
    table.observe(2, [4])
    table.observe(0, [7])
    table.observe(1, [7])  # nothing is known of 7
    assert table.predict(2, 2) == [4, 2]  # 4 once more than 2


@pytest.mark.parametrize("copy", COPIES)
def test_the_tokens_of_a_step_have_their_own_evidence(copy: Any) -> None:
    table = copy(2, 6)
    for _ in range(9):
        table.observe_step(0, [[0], [1], [2]])
        table.observe_step(1, [[3], [4], [5]])
    table.observe_step(0, [[2], [0]])
    assert [table.predict(1, 1, token) for token in range(2)] == [[5], [3]]
    table.observe_step(1, [[3]])  # the rows that are not needed were left out: whose is it?
    table.observe_step(0, [[0]])
    assert table.predict(1, 1) == [3]
    near = table.state()[36:72]
    assert sum(near) == 27


@pytest.mark.parametrize("copy", COPIES)
def test_a_restored_table_predicts_the_same(copy: Any) -> None:
    trace = made_up(3)
    layers, experts = trace.shape.layers, trace.shape.experts
    learned, restored = copy(layers, experts), copy(layers, experts)
    score(trace, learned)
    restored.restore(learned.state())
    assert len(learned.state()) == state_bytes(layers, experts)
    for layer in range(layers):
        for table in (learned, restored):
            table.observe(layer, (1, 2))
    for layer in range(1, layers):
        for table in (learned, restored):
            table.observe(layer - 1, (1, 2))
        assert learned.predict(layer, experts) == restored.predict(layer, experts)
    with pytest.raises(ValueError, match="another shape"):
        restored.restore(learned.state()[:-1])


def test_what_is_not_there_is_refused() -> None:
    for copy in COPIES:
        with pytest.raises(ValueError, match="there must be"):
            copy(1, 0)
    table = _kernels.PairTable(2, 4)
    for call in [
        lambda: table.observe(2, [0]),
        lambda: table.observe(0, [4]),
        lambda: table.observe(0, [-1]),
        lambda: table.observe_step(0, [[0], [1, 2]]),
        lambda: table.predict(-1, 1),
        lambda: table.predict(0, 5),
        lambda: table.predict(0, 1, -1),
    ]:
        with pytest.raises(ValueError, match=r"no such|not so many|as many"):
            call()


def test_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = random.Random(0).randbytes(state_bytes(3, 5))
    path = tmp_path / "model" / "pairs.bin"
    assert read_table(path, 3, 5) is None
    write_table(path, 3, 5, state)  # the folder was removed with the copy of a model's earlier state
    assert not path.parent.exists()
    assert not caplog.records
    path.parent.mkdir()
    write_table(path, 3, 5, state)
    assert read_table(path, 3, 5) == state
    assert [file.name for file in path.parent.iterdir()] == ["pairs.bin"]
    good = path.read_bytes()
    cases = {
        "belongs to another": [b"", good[:20], b"x" + good[1:]],
        "cannot be read": [good[:24] + b"nonsense", good[:-1] + bytes([good[-1] ^ 1])],
        "is damaged": [
            good[:24],
            good[:-9],
            good[:24] + zlib.compress(state[:-1]),
            good[:24] + zlib.compress(bytes(9**7)),
        ],
    }
    for message, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            caplog.clear()
            assert read_table(path, 3, 5) is None
            assert message in caplog.text
    path.write_bytes(good)
    for layers, experts in [(4, 5), (3, 4)]:
        assert read_table(path, layers, experts) is None
    path.unlink()
    path.mkdir()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert read_table(path, 3, 5) is None
        write_table(path, 3, 5, state)
    assert "cannot be read" in caplog.text
    assert "cannot be written" in caplog.text
