"""The engine on models whose experts are paged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgellm.config import Settings
from edgellm.engine.fit import plan_load
from edgellm.engine.loaded import load_runner
from edgellm.engine.runner import Runner
from edgellm.engine.types import FinishReason
from edgellm.errors import ExpertReadError, ModelTooLargeError, ModelUnsupportedError
from edgellm.models.describe import describe
from edgellm.moe.pack import write_pack
from tests.engine.rig import answer, drain, start
from tests.moe.test_paging import withhold_routers
from tests.moe.test_store import unreadable
from tests.support.tiny_moe import write_tiny_moe

CLIENTS, TOKENS = 4, 500


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_moe(tmp_path / "moe.gguf", "qwen3moe", context=4096)


def a_paged_runner(path: Path, budget: int | str, **fields: object) -> Runner:
    settings = Settings(expert_memory_bytes=budget, context_tokens=4096, threads=2, **fields)
    return load_runner(describe(path), settings)


def least(path: Path) -> int:
    with pytest.raises(ModelTooLargeError) as found:
        a_paged_runner(path, 1)
    return found.value.needed_bytes


def test_four_clients_at_the_least_budget(path: Path) -> None:
    """A soak: every step streams nearly all experts; the tokens are those of a run with all experts in memory."""
    texts = []
    for budget in (least(path), "auto"):
        runner = a_paged_runner(path, budget)
        prompts = [[10 * client + number for number in range(10)] for client in range(CLIENTS)]
        sinks = [start(runner, prompt, TOKENS)[0] for prompt in prompts]
        drain(runner)
        store = runner.model.experts
        assert store is not None
        stats = store.stats
        texts.append([sink.tokens() for sink in sinks])
        assert [len(tokens) for tokens in texts[-1]] == [TOKENS] * CLIENTS
        assert all(sink.finish().reason is FinishReason.LENGTH for sink in sinks)
        assert stats.needed == stats.hits + stats.loads + stats.streamed + stats.prefetch_used
        assert (stats.streamed == stats.needed) == (budget != "auto")
        runner.close()
    assert texts[0] == texts[1]


@pytest.mark.parametrize("budget", ["least", "auto"])
def test_a_read_error_ends_the_requests_and_not_the_server(path: Path, budget: str) -> None:
    runner = a_paged_runner(path, least(path) if budget == "least" else "auto")
    with unreadable(path):
        sinks = [start(runner, [1, 2, 3, 4], 5)[0] for _ in range(2)]
        drain(runner)
        for sink in sinks:
            assert isinstance(sink.error, ExpertReadError)
            assert "cannot read expert" in str(sink.error)
    tokens = answer(runner, [1, 2, 3, 4], 5).tokens()
    assert runner.stats.failures == 1
    runner.close()
    fresh = a_paged_runner(path, "auto")
    assert answer(fresh, [1, 2, 3, 4], 5).tokens() == tokens
    fresh.close()


def test_checksums_are_made_once_and_hold(path: Path, tmp_path: Path) -> None:
    runner = a_paged_runner(path, least(path), expert_checksums="on")
    tokens = answer(runner, [1, 2, 3, 4], 5).tokens()
    runner.close()
    (file,) = (tmp_path / "state" / "experts").glob("*/checksums.npy")
    made = np.load(file)
    np.save(file, made + 1)  # as if the disk had changed: the checksums are read, and not made again
    runner = a_paged_runner(path, least(path), expert_checksums="on")
    assert "is damaged" in str(answer(runner, [1, 2, 3, 4], 5).error)
    runner.close()
    file.write_bytes(b"nonsense")
    runner = a_paged_runner(path, least(path), expert_checksums="on")
    assert answer(runner, [1, 2, 3, 4], 5).tokens() == tokens
    runner.close()
    assert np.array_equal(np.load(file), made)


def test_a_changed_file_is_told(path: Path) -> None:
    runner = a_paged_runner(path, least(path))
    assert answer(runner, [1, 2, 3], 3).tokens()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    sink = answer(runner, [1, 2, 3, 4], 5)
    assert "changed while it was in use" in str(sink.error)
    runner.close()


def test_memory_is_planned_with_the_budget(path: Path) -> None:
    info = describe(path)
    budget = least(path) + 100_000
    settings = [Settings(expert_memory_bytes=value) for value in (budget, "auto", "off")]
    paged, auto, off = (plan_load(info, each).memory for each in settings)
    assert paged.expert_bytes == budget
    assert off.expert_bytes is None
    assert off.weights_bytes - paged.weights_bytes == info.expert_bytes
    assert auto.expert_bytes is not None
    assert auto.expert_bytes >= info.expert_bytes
    little = plan_load(info, Settings(), room_bytes=paged.total_bytes - budget + 300_000).memory
    assert little.expert_bytes == 300_000


def test_the_profile_fills_the_next_start(path: Path, tmp_path: Path) -> None:
    runner = a_paged_runner(path, "auto")
    answer(runner, list(range(40)), 5)
    counts = runner.model.experts.counts() if runner.model.experts else None
    runner.close()
    (saved,) = (tmp_path / "state" / "experts").glob("*/routing.npy")
    assert np.array_equal(np.load(saved), counts)
    budget = least(path) + 400_000
    runner = a_paged_runner(path, budget)
    store = runner.model.experts
    assert store is not None
    held = store.resident_bytes
    assert held > 0  # before anything was asked
    answer(runner, list(range(40)), 5)
    assert store.stats.prefetched == store.stats.prefetch_used  # look-ahead's affair, and it has nothing to read here
    assert store.stats.hits > 0
    runner.close()


def test_a_pack_is_served_and_not_mapped(path: Path, tmp_path: Path) -> None:
    pack = tmp_path / "moe.pack.gguf"
    write_pack(path, pack)
    texts = []
    for file in (path, pack):
        runner = a_paged_runner(file, "auto", expert_checksums="on")
        texts.append(answer(runner, [1, 2, 3, 4], 8).tokens())
        runner.close()
    assert texts[0] == texts[1]
    with pytest.raises(ModelUnsupportedError, match="can only be paged"):
        a_paged_runner(pack, "off")


def test_the_table_is_kept_with_the_model(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    withhold_routers(monkeypatch)

    def served() -> tuple[bytes, bytes]:
        """What the table has learned at the start, and at the end."""
        runner = a_paged_runner(path, least(path) + 200_000)
        store, pager = runner.model.experts, runner.pager
        assert store is not None
        assert pager is not None
        before = store.table_state()
        answer(runner, list(range(40)), 30)
        snapshot, after = pager.snapshot(), store.table_state()
        runner.close()
        assert snapshot is not None
        assert snapshot.predictor == "table"
        assert snapshot.stats.prefetched > 0
        assert before is not None
        assert after is not None
        return before, after

    before, after = served()
    assert not any(before)
    again, later = served()
    assert again == after != later
    (file,) = (tmp_path / "state" / "experts").glob("*/pairs.bin")
    assert not caplog.records
    file.write_bytes(file.read_bytes()[:-7])
    before, _ = served()
    assert not any(before)
    assert "is begun anew" in caplog.text
