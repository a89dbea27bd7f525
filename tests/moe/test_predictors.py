"""Predictors that need no hidden states: what each foresees, and the control."""

from __future__ import annotations

import pytest

from edgellm.moe.pair_table import PairTable
from edgellm.moe.predictors import HotList, PreviousToken, Told, score
from edgellm.moe.routes import DECODE, Shape, Step, Trace
from tests.moe.traces import all_traces

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
    first, *rest = score(trace, PairTable(4, 8)).layers
    assert min(rest) > 0.85  # the first period is not known yet
    assert first < 0.5  # nothing lies before it
    assert score(trace, PreviousToken(4)).overall == pytest.approx(0.5, abs=0.02)
    assert score(trace, HotList(4, 8)).overall < 0.45


def test_recall_is_counted_by_layer() -> None:
    steps = tuple(Step(0, DECODE, t, ((1, 2), (t % 2, 4))) for t in range(9))
    trace = Trace(Shape("x", "none", 2, 8, 2, (1, 1)), steps)
    recall = score(trace, PreviousToken(2))
    assert recall.layers == (8 / 9, 4 / 9)
    assert recall.overall == 12 / 18
