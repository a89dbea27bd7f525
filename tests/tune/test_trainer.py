"""The trainer on a tiny model: it learns, the cache changes nothing, and it goes on as if it had not been stopped."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgellm.errors import ConfigError  # noqa: E402 (torch first: without it all of this is skipped)
from edgellm.tune.coding import TrainingSequence  # noqa: E402
from edgellm.tune.decoder import Decoder  # noqa: E402
from edgellm.tune.lora import Lora, LoraConfig, Site  # noqa: E402
from edgellm.tune.packing import PackedRows, pack  # noqa: E402
from edgellm.tune.trainer import PrefixCache, Trainer, TrainingPlan, row_of  # noqa: E402
from edgellm.tune.weights import BaseWeights  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama  # noqa: E402

ROW = 48


def some_rows(seed: int = 0, count: int = 9) -> PackedRows:
    draw = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        tokens = draw.integers(0, 250, int(draw.integers(8, 30))).astype(np.int32)
        mask = np.zeros(len(tokens), bool)
        mask[len(tokens) // 2 :] = True
        sequences.append(TrainingSequence(tokens, mask))
    return pack(sequences, ROW, seed=1)


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    return Decoder(BaseWeights(write_tiny_llama(tmp_path / "model.gguf")), dtype=torch.float32)


def a_trainer(
    decoder: Decoder, cache: PrefixCache | None = None, epochs: int = 4, rows: PackedRows | None = None
) -> Trainer:
    top = decoder.shape.layers - 1
    lora = Lora(decoder.shape, [Site(top, "attn_q"), Site(top, "ffn_down")], LoraConfig(rank=8), seed=3)
    plan = TrainingPlan(epochs=epochs, rows_per_step=2, learning_rate=2e-2)
    return Trainer(decoder, lora, some_rows() if rows is None else rows, plan, cache=cache)


def weights_of(trainer: Trainer) -> list[np.ndarray]:
    return [tensor.detach().numpy().copy() for tensor in trainer.lora.parameters()]


def test_it_learns_its_examples(decoder: Decoder) -> None:
    trainer = a_trainer(decoder, epochs=30)
    before = trainer.validate(trainer.rows)
    steps = list(trainer.steps())
    after = trainer.validate(trainer.rows)
    assert [step.step for step in steps] == list(range(1, trainer.total_steps + 1))
    assert after.loss < 0.5 * before.loss
    assert after.accuracy > before.accuracy
    assert sum(step.trained_tokens for step in steps) == 30 * before.trained_tokens
    assert steps[-1].learning_rate < steps[len(steps) // 2].learning_rate


def test_rows_lose_their_padding_and_nothing_else() -> None:
    rows = some_rows()
    learnt = 0
    for number in range(len(rows.tokens)):
        packed, places, targets = row_of(rows, number)
        assert sum(packed.lengths) == len(packed.tokens) == (rows.segments[number] > 0).sum()
        assert packed.tokens[places + 1].tolist() == targets.tolist()
        learnt += len(targets)
    assert learnt == rows.mask.sum()


def test_the_cache_of_the_prefix_changes_nothing(decoder: Decoder, tmp_path: Path) -> None:
    rows = some_rows()
    path = tmp_path / "prefix.bin"
    cache = PrefixCache(path, len(rows.tokens), ROW, decoder.shape.width, torch.float32)
    assert path.stat().st_mode & 0o777 == 0o600
    with_it, without = a_trainer(decoder, cache), a_trainer(decoder)
    assert [step.loss for step in with_it.steps()] == [step.loss for step in without.steps()]
    prefixes = 0

    def counted(*_: object) -> None:
        nonlocal prefixes
        prefixes += 1

    decoder.prefix = counted  # type: ignore[assignment, method-assign]
    again = a_trainer(decoder, cache, epochs=2)
    list(again.steps())
    assert prefixes == 0
    cache.close()
    cache.close()
    assert not path.exists()


def test_all_epochs_see_what_the_cache_keeps(decoder: Decoder, tmp_path: Path) -> None:
    """A cache of half the bits rounds; the first epoch must not compute with more than the later ones."""
    rows = some_rows()
    shape = (len(rows.tokens), ROW, decoder.shape.width, torch.bfloat16)
    cache = PrefixCache(tmp_path / "prefix.bin", *shape)
    stream = decoder.prefix(row_of(rows, 0)[0], 1)
    put = cache.put(0, stream)
    found = cache.get(0, len(stream))
    assert found is not None
    assert torch.equal(put, found)
    assert not torch.equal(put, stream)
    cache.close()


def test_a_disk_without_room_for_the_cache_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        PrefixCache(tmp_path / "prefix.bin", 4, ROW, 64, torch.float32)


def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(decoder: Decoder, tmp_path: Path) -> None:
    whole = a_trainer(decoder)
    list(whole.steps())
    first = a_trainer(decoder)
    for step in first.steps():
        if step.step == 7:
            torch.save(first.state(), tmp_path / "checkpoint.pt")
            break
    second = a_trainer(decoder)
    second.restore(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    list(second.steps())
    for mine, other in zip(weights_of(whole), weights_of(second), strict=True):
        assert np.array_equal(mine, other)
    other_sites = Lora(decoder.shape, [Site(0, "attn_k")], LoraConfig(rank=8))
    with pytest.raises(ConfigError, match="another adapter"):
        Trainer(decoder, other_sites, some_rows(), TrainingPlan(1, 1, 1e-3)).restore(first.state())


@pytest.mark.parametrize(
    "bad", [{"epochs": 0}, {"rows_per_step": 0}, {"learning_rate": float("nan")}, {"learning_rate": 0}]
)
def test_plans_that_are_none(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        TrainingPlan(**{"epochs": 1, "rows_per_step": 1, "learning_rate": 1e-3, **bad})  # type: ignore[arg-type]
