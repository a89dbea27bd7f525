"""Models whose experts are paged compute what they compute with all experts in memory, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.moe.layout import ExpertLayout, read_layout
from edgellm.moe.pager import load_paged
from edgellm.moe.pair_table import PairTable
from tests.support.moe_traits import ARCHITECTURES
from tests.support.tiny_moe import write_tiny_moe

Logits = npt.NDArray[np.float32]
PROMPT, STEPS = 24, 8


def layout_of(path: Path, *, packed: bool = True) -> ExpertLayout:
    layout = read_layout(path, packed=packed)
    assert layout is not None
    return layout


def withhold_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are loaded from now on have routers that cannot be read."""
    monkeypatch.setattr("edgellm.moe.pager.router_width", lambda _: 0)


def run(model: Model) -> Logits:
    """Logits, (rows, vocabulary), of two prompts read together, and of steps of both and of one; closes the model."""
    context = Context(model, ContextParams(512, sequences=4, batch_tokens=64, outputs=64, threads=2))
    batch, rows = Batch(64), []
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 250, 2 * (PROMPT + STEPS))]
    batch.extend(tokens[:PROMPT], 0, 0, outputs=PROMPT)
    batch.extend(tokens[PROMPT : 2 * PROMPT], 0, 1, outputs=PROMPT)
    context.decode(batch)
    rows += [context.logits(row).copy() for row in range(2 * PROMPT)]
    positions = [PROMPT, PROMPT]
    for step in range(STEPS):
        batch.clear()
        for sequence in range(1 + step % 2):
            batch.extend([tokens[-1 - step - sequence]], positions[sequence], sequence, outputs=1)
            positions[sequence] += 1
        context.decode(batch)
        rows += [context.logits(row).copy() for row in range(1 + step % 2)]
    context.close()
    model.close()
    return np.array(rows)


def budgets(layout: ExpertLayout) -> list[int]:
    """All experts, half of them, a few, and the least there is."""
    span = layout.whole_bytes - layout.least_bytes
    return [layout.whole_bytes, layout.least_bytes + span // 2, layout.least_bytes + span // 9, layout.least_bytes]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_budget_gives_the_same_logits(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "model.gguf", architecture, weights="q4_k")
    layout = layout_of(path)
    whole, *less = [run(load_paged(layout, budget, tmp_path)) for budget in budgets(layout)]
    assert np.isfinite(whole).all()
    for logits in less:
        assert np.array_equal(logits, whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unpacked_experts_give_llama_cpps_own_logits(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "model.gguf", architecture, weights="f32")
    layout = layout_of(path, packed=False)
    expected = run(Model(path, mapped=False))
    for budget in budgets(layout):
        assert np.array_equal(run(load_paged(layout, budget, tmp_path, packed=False)), expected)


@pytest.mark.parametrize("architecture", [name for name, traits in ARCHITECTURES.items() if traits.gate_up == "either"])
def test_merged_gate_and_up(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "model.gguf", architecture, weights="f32", merged=True)
    layout = layout_of(path)
    assert len(layout.slices) == 2 * layout.layers
    expected = run(Model(path, mapped=False))
    assert np.array_equal(run(load_paged(layout, layout.least_bytes, tmp_path)), expected)


def test_a_layer_that_llama_cpp_leaves_out_is_no_fault(tmp_path: Path) -> None:
    """Experts of a block that predicts a second token are in the file, and nothing asks for them."""
    path = write_tiny_moe(tmp_path / "model.gguf", "glm4moe", layers=5, nextn=True)
    layout = layout_of(path)
    expected = run(Model(path, mapped=False, packed=True))
    for budget in budgets(layout):
        model = load_paged(layout, budget, tmp_path)
        assert model.experts is not None
        assert model.experts.claimed == [True] * (layout.layers - 1) + [False]
        logits = run(model)
        assert np.isfinite(logits).all()
        assert np.median(np.abs(logits - expected).max(axis=1)) < 0.5
    assert np.array_equal(
        run(load_paged(layout_of(path, packed=False), budget, tmp_path, packed=False)), run(Model(path, mapped=False))
    )


@pytest.mark.parametrize("weights", ["q4_0", "q5_1", "q8_0", "q6_k", "q3_k", "f16", "bf16"])
def test_types(weights: str, tmp_path: Path) -> None:
    """Those that are packed, and those that are multiplied as llama.cpp does."""
    path = write_tiny_moe(tmp_path / "model.gguf", "qwen3moe", weights=weights)
    layout = layout_of(path)
    whole, *less = [run(load_paged(layout, budget, tmp_path)) for budget in budgets(layout)]
    for logits in less:
        assert np.array_equal(logits, whole)
    own = run(Model(path, mapped=False, packed=True))  # experts in memory, in llama.cpp's layout
    assert np.median(np.abs(own - whole).max(axis=1)) < 0.5  # of logits whose standard deviation is 3


def test_experts_are_read_when_they_are_needed(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "model.gguf", "qwen3moe")
    layout = layout_of(path)
    model = load_paged(layout, layout.least_bytes + (layout.whole_bytes - layout.least_bytes) // 2, tmp_path)
    store = model.experts
    assert store is not None
    assert store.stats.reads == 0
    context = Context(model, ContextParams(64, sequences=1, batch_tokens=8, outputs=8, threads=2))
    batch = Batch(8)
    for position in range(20):
        batch.clear()
        batch.extend([7 * position % 250], position, 0, outputs=1)
        context.decode(batch)
    stats = store.stats
    context.close()
    model.close()
    assert stats.visits == 20 * layout.layers
    assert stats.needed == stats.visits * 2
    assert stats.needed == stats.hits + stats.loads + stats.streamed
    assert 0 < stats.hits < stats.needed
    assert stats.reads == 3 * (stats.loads + stats.streamed)
    assert stats.bytes == stats.reads * layout.read_bytes[0] // 3


@pytest.mark.parametrize(
    ("architecture", "known", "expected"),
    [
        ("qwen3moe", True, "routers"),
        ("qwen3moe", False, "table"),
        ("llama4", True, "table"),  # its experts do not see what its router sees
    ],
)
def test_where_routers_cannot_be_used_the_table_reads_ahead(
    architecture: str, known: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_moe(tmp_path / "model.gguf", architecture, weights="q4_k")
    layout = layout_of(path)
    whole = run(load_paged(layout, layout.whole_bytes, tmp_path))
    if not known:
        withhold_routers(monkeypatch)
    model = load_paged(layout, layout.least_bytes + (layout.whole_bytes - layout.least_bytes) // 2, tmp_path)
    store = model.experts
    assert store is not None
    store.read_ahead(True)
    context = Context(model, ContextParams(512, sequences=1, batch_tokens=8, outputs=8, threads=2))
    batch = Batch(8)
    for position in range(120):
        batch.clear()
        batch.extend([7 * position % 250], position, 0, outputs=1)
        context.decode(batch)
    stats, predictor = store.stats, store.predictor
    context.close()
    assert predictor == expected
    assert stats.prefetched > 0
    assert stats.prefetch_used > 0
    assert np.array_equal(run(model), whole)  # closes it, in the end


def test_what_the_table_learns_is_what_the_routers_choose(tmp_path: Path) -> None:
    """Prompts and steps of several sequences, by the log; the other copy of the table learns the same from it."""
    path = write_tiny_moe(tmp_path / "model.gguf", "qwen3moe")
    layout = layout_of(path)
    model = load_paged(layout, layout.least_bytes, tmp_path)
    store = model.experts
    assert store is not None
    context = Context(model, ContextParams(512, sequences=2, batch_tokens=16, outputs=16, threads=2))
    batch, other = Batch(16), PairTable(layout.layers, layout.experts)
    positions = [0, 0]
    store.log_routes(True)
    for counts in [(9, 7), (1, 0), (1, 1), (0, 1), (1, 1), (5, 1)]:
        batch.clear()
        for sequence, count in enumerate(counts):
            batch.extend(
                [11 * (positions[sequence] + i) % 250 for i in range(count)], positions[sequence], sequence, outputs=1
            )
            positions[sequence] += count
        context.decode(batch)
        rows: dict[int, list[list[int]]] = {}
        log = store.take_log().tolist()
        while log:
            distance, layer, _, used = log[:4]
            if distance < 0:
                rows.setdefault(layer, []).append(log[4 : 4 + used])
            log = log[4 + used :]
        for layer, chosen in rows.items():
            other.observe_step(layer, chosen)
    state = store.table_state()
    context.close()
    model.close()
    assert state == other.state()
    assert any(state)


def test_where_every_expert_has_a_slot_nothing_is_learned(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "model.gguf", "qwen3moe")
    layout = layout_of(path)
    model = load_paged(layout, layout.whole_bytes, tmp_path)
    assert model.experts is not None
    assert model.experts.table_state() is None
    model.close()
