"""Predictors that need no hidden states: what each foresees, the control, and the table's file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from edgellm.errors import InvalidTraceError
from edgellm.moe.predictors import HotList, PairTable, PreviousToken, Told, score
from edgellm.moe.routes import DECODE, Shape, Step, Trace
from tests.moe.traces import all_traces, made_up

TRACES = all_traces()
NAMES = [trace.shape.model.rpartition("/")[2] for trace in TRACES]


def periodic(period: int) -> Trace:
    """Layer l of token t uses expert (t + l) % period and the one after it."""
    steps = tuple(
        Step(0, DECODE, t, tuple(((t + layer) % period, (t + layer + 1) % period) for layer in range(4)))
        for t in range(60)
    )
    return Trace(Shape("periodic", "none", 4, 8, 2, (1,) * 4), steps)


@pytest.mark.parametrize("trace", TRACES, ids=NAMES)
def test_the_control_reads_everything(trace: Trace) -> None:
    recall = score(trace, Told())
    assert recall.overall == 1.0
    assert set(recall.layers) == {1.0}


@pytest.mark.parametrize("trace", TRACES, ids=NAMES)
def test_every_predictor_beats_chance_and_the_table_the_hot_list(trace: Trace) -> None:
    layers, experts = trace.shape.layers, trace.shape.experts
    chance = trace.shape.top_k / experts
    hot = score(trace, HotList(layers, experts)).overall
    assert score(trace, PreviousToken(layers)).overall > 1.5 * chance
    assert hot > 1.5 * chance
    if not trace.shape.model.startswith("made-up"):  # there the layers choose independently of one another
        assert score(trace, PairTable(layers, experts)).overall > hot + 0.1


def test_a_rule_is_learned() -> None:
    """With a period of 7 the layer before tells everything, the token before half, frequencies nothing."""
    trace = periodic(7)
    assert score(trace, PairTable(4, 8)).overall > 0.85  # the first period is not known yet
    assert score(trace, PreviousToken(4)).overall == pytest.approx(0.5, abs=0.02)
    assert score(trace, HotList(4, 8)).overall < 0.45


def test_recall_is_counted_by_layer() -> None:
    steps = tuple(Step(0, DECODE, t, ((1, 2), (t % 2, 4))) for t in range(9))
    trace = Trace(Shape("x", "none", 2, 8, 2, (1, 1)), steps)
    recall = score(trace, PreviousToken(2))
    assert recall.layers == (8 / 9, 4 / 9)
    assert recall.overall == 12 / 18


def test_unseen_keys_fall_back_to_single_experts_then_to_frequency() -> None:
    table = PairTable(3, 8)
    for _ in range(3):
        for layer, experts in enumerate([(0, 1), (2, 3), (4, 5)]):
            table.observe(layer, experts)
    table.observe(0, (6, 7))  # no such key yet
    table.observe(1, (2, 7))
    assert set(table.predict(2, 2)) == {4, 5}  # they followed 2
    table.observe(2, (0, 1))
    table.observe(0, (6, 7))
    table.observe(1, (6, 1))
    assert set(table.predict(2, 2)) == {4, 5}  # nothing known of 1 and 6 there: the most frequent


def test_the_table_is_bounded_and_forgets_the_oldest() -> None:
    table = PairTable(1, 16, keys=3)
    for expert in range(12):
        table.observe(0, (expert,))
    assert len(table._exact[0]) == 3
    assert list(table._exact[0])[-1] == (9, -1, 10)


def test_a_saved_table_predicts_the_same(tmp_path: Path) -> None:
    trace = made_up(3)
    learned = PairTable(trace.shape.layers, trace.shape.experts)
    score(trace, learned)
    path = tmp_path / "model" / "experts.gz"
    learned.save(path)
    loaded = PairTable.load(path, trace.shape.layers, trace.shape.experts)
    assert [file.name for file in path.parent.iterdir()] == ["experts.gz"]
    learned.observe(0, (1, 2))
    loaded.observe(0, (1, 2))
    learned._before = loaded._before
    for layer in range(trace.shape.layers):
        assert learned.predict(layer, 8) == loaded.predict(layer, 8)
    small = PairTable.load(path, trace.shape.layers, trace.shape.experts, keys=2)
    assert all(len(keys) == 2 for keys in small._exact)


def test_unsound_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "experts.gz"
    PairTable(2, 4).save(path)
    good: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    PairTable.load(path, 2, 4)
    for layers, experts in [(3, 4), (2, 5)]:
        with pytest.raises(InvalidTraceError):
            PairTable.load(path, layers, experts)
    for change in [
        {"format": "another"},
        {"hot": [[0] * 4]},
        {"hot": [[0] * 4, [0] * 3]},
        {"hot": [[0] * 4, [0, 0, 0, -1]]},
        {"hot": [[0] * 4, [0, 0, 0, True]]},
        {"after": [[], [[4, []]]]},
        {"after": [[], [[0, [[1, 1.5]]]]]},
        {"exact": [[], [[[0, -2], []]]]},
        {"exact": [[], [[[0, "1"], []]]]},
        {"exact": [[], 7]},
        {"exact": None},
    ]:
        path.write_bytes(gzip.compress(json.dumps(good | change).encode()))
        with pytest.raises(InvalidTraceError, match=r"experts\.gz"):
            PairTable.load(path, 2, 4)
    for data in [b"", b"plain", gzip.compress(b"[]"), gzip.compress(b"\xff"), gzip.compress(b"{}")[:-3]]:
        path.write_bytes(data)
        with pytest.raises(InvalidTraceError):
            PairTable.load(path, 2, 4)
    with pytest.raises(FileNotFoundError):
        PairTable.load(tmp_path / "none", 2, 4)
    with pytest.raises(ValueError, match="room"):
        PairTable(1, 1, keys=0)
