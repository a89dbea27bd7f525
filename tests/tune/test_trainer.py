"""The trainer on a tiny model: it learns, the cache changes nothing, and it goes on as if it had not been stopped."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgellm.errors import ConfigError  # noqa: E402 (torch first: without it all of this is skipped)
from edgellm.tune.batches import Batch, Examples  # noqa: E402
from edgellm.tune.coding import TrainingSequence  # noqa: E402
from edgellm.tune.decoder import Decoder  # noqa: E402
from edgellm.tune.lora import Lora, LoraConfig  # noqa: E402
from edgellm.tune.prefix_cache import PrefixCache  # noqa: E402
from edgellm.tune.scheme import Site  # noqa: E402
from edgellm.tune.trainer import Trainer, TrainingPlan  # noqa: E402
from edgellm.tune.weights import BaseWeights  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama  # noqa: E402


def sequence(draw: np.random.Generator) -> TrainingSequence:
    tokens = draw.integers(0, 250, int(draw.integers(8, 30))).astype(np.int32)
    mask = np.zeros(len(tokens), bool)
    mask[len(tokens) // 2 :] = True
    return TrainingSequence(tokens, mask)


def some_examples(seed: int = 0, count: int = 9, width: int = 1) -> Examples:
    draw = np.random.default_rng(seed)
    return Examples(tuple(sequence(draw) for _ in range(count * width)), width)


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    return Decoder(BaseWeights(write_tiny_llama(tmp_path / "model.gguf")), dtype=torch.float32)


def a_trainer(
    decoder: Decoder,
    examples: Examples | None = None,
    *,
    epochs: int = 4,
    batch: int = 4,
    pack_tokens: int = 48,
    validation: Examples | None = None,
    cache: PrefixCache | None = None,
    rate: float = 2e-2,
) -> Trainer:
    top = decoder.shape.layers - 1
    lora = Lora(decoder.shape, [Site(top, "attn_q"), Site(top, "ffn_down")], LoraConfig(rank=8), seed=3)
    plan = TrainingPlan(epochs=epochs, batch_size=batch, learning_rate=rate, pack_tokens=pack_tokens)
    return Trainer(decoder, lora, examples or some_examples(), plan, validation=validation, cache=cache)


def a_cache(folder: Path, decoder: Decoder, *parts: Examples, dtype: torch.dtype = torch.float32) -> PrefixCache:
    lengths = [len(one.tokens) for part in parts for one in part.sequences]
    return PrefixCache(folder, lengths, decoder.shape.width, dtype)


def weights_of(trainer: Trainer) -> list[np.ndarray]:
    return [tensor.detach().numpy().copy() for tensor in trainer.lora.parameters()]


@pytest.fixture
def counted(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens each call of the prefix computed."""
    calls: list[int] = []
    prefix = decoder.prefix

    def count(packed: object, end: int) -> object:
        calls.append(len(packed.tokens))  # type: ignore[attr-defined]
        return prefix(packed, end)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "prefix", count)
    return calls  # type: ignore[return-value]


def test_it_learns_its_examples(decoder: Decoder) -> None:
    examples = some_examples()
    trainer = a_trainer(decoder, examples, epochs=30, validation=examples)
    before = trainer.validate()
    steps = list(trainer.steps())
    after = trainer.validate()
    assert before is not None
    assert after is not None
    assert [step.step for step in steps] == list(range(1, trainer.total_steps + 1))
    assert after.loss < 0.5 * before.loss
    assert after.accuracy > before.accuracy
    assert sum(step.trained_tokens for step in steps) == 30 * before.trained_tokens
    assert sum(step.all_tokens for step in steps) == 30 * sum(len(one.tokens) for one in examples.sequences)
    assert steps[-1].learning_rate < steps[len(steps) // 2].learning_rate


def test_each_example_is_learnt_once_an_epoch(decoder: Decoder) -> None:
    trainer = a_trainer(decoder, epochs=2)
    assert trainer.steps_per_epoch == 3
    for epoch in range(2):
        seen = [number for step in range(3) for number in trainer._examples_of_step(3 * epoch + step)]
        assert sorted(seen) == list(range(9))
    assert trainer._examples_of_step(0) != trainer._examples_of_step(3)


def test_how_a_step_is_packed_changes_nothing(decoder: Decoder) -> None:
    """One pack for a whole step, or one for each sequence: the same gradients but for rounding."""
    wide, narrow = a_trainer(decoder, pack_tokens=10_000), a_trainer(decoder, pack_tokens=1)
    for one, other in zip(wide.steps(), narrow.steps(), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    for mine, its in zip(weights_of(wide), weights_of(narrow), strict=True):
        assert np.allclose(mine, its, atol=2e-3)


def test_a_batch_learns_what_is_masked_and_nothing_else() -> None:
    examples = some_examples()
    members = [3, 0, 5]
    batch = examples.batch(members)
    assert batch.tokens == sum(len(examples.sequences[number].tokens) for number in members)
    for index, number in enumerate(members):
        one, mine = examples.sequences[number], batch.owners == index
        rows = batch.packed.rows(index).tolist()
        learnt = one.mask.nonzero()[0].tolist()
        assert batch.targets[mine].tolist() == one.tokens[learnt].tolist()
        assert batch.places[mine].tolist() == [rows[place - 1] for place in learnt]


def test_pairs_stay_together_in_packs() -> None:
    examples = some_examples(width=2)
    packs = examples.packs(range(9), 60)
    assert sorted(member for pack in packs for member in pack) == list(range(18))
    assert all(
        pack[index] % 2 == 0 and pack[index + 1] == pack[index] + 1
        for pack in packs
        for index in range(0, len(pack), 2)
    )
    assert len(packs) > 1


def test_the_cache_of_the_prefix_changes_nothing(decoder: Decoder, tmp_path: Path, counted: list[int]) -> None:
    examples, other = some_examples(), some_examples(seed=5, count=3)
    tokens = sum(len(one.tokens) for one in (*examples.sequences, *other.sequences))
    cache = a_cache(tmp_path, decoder, examples, other)
    with_it = a_trainer(decoder, examples, validation=other, cache=cache)
    losses = [step.loss for step in with_it.steps()]
    looked = [with_it.validate(), with_it.validate()]
    assert sum(counted) == tokens  # each once, of the validation too
    without = a_trainer(decoder, examples, validation=other)
    assert [step.loss for step in without.steps()] == pytest.approx(losses, rel=1e-4)
    expected = without.validate()
    assert expected is not None
    assert [one.loss for one in looked if one] == pytest.approx([expected.loss] * 2, rel=1e-3)
    cache.close()
    cache.close()
    assert not list(tmp_path.glob("tmp*")), "the file has no name"


def test_all_epochs_see_what_the_cache_keeps(decoder: Decoder, tmp_path: Path) -> None:
    """A cache of half the bits rounds; the first epoch must not compute with more than the later ones."""
    examples = some_examples()
    cache = a_cache(tmp_path, decoder, examples, dtype=torch.bfloat16)
    stream = decoder.prefix(Batch.of(examples.sequences[:1]).packed, 1)
    put = cache.put(0, stream)
    found = cache.get(0)
    assert found is not None
    assert torch.equal(put, found)
    assert not torch.equal(put, stream)
    assert cache.get(1) is None
    cache.close()


def test_a_disk_without_room_for_the_cache_is_told_at_once(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="too much"):
        PrefixCache(tmp_path, [1 << 50], 64)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        a_cache(tmp_path, decoder, some_examples())


def test_a_cache_that_cannot_be_written_is_gone_without(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.pwritev", broken)
    cache = a_cache(tmp_path, decoder, some_examples())
    losses = [step.loss for step in a_trainer(decoder, cache=cache).steps()]
    assert losses == pytest.approx([step.loss for step in a_trainer(decoder).steps()], rel=1e-6)
    cache.close()


@pytest.mark.parametrize("width", [1, 2])
def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(decoder: Decoder, tmp_path: Path, width: int) -> None:
    examples = some_examples(width=width)
    whole = a_trainer(decoder, examples)
    list(whole.steps())
    first = a_trainer(decoder, examples)
    for step in first.steps():
        if step.step == 7:
            torch.save(first.state(), tmp_path / "checkpoint.pt")
            break
    second = a_trainer(decoder, examples)
    second.restore(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    list(second.steps())
    for mine, other in zip(weights_of(whole), weights_of(second), strict=True):
        assert np.array_equal(mine, other)
    other_sites = Lora(decoder.shape, [Site(0, "attn_k")], LoraConfig(rank=8))
    with pytest.raises(ConfigError, match="another adapter"):
        Trainer(decoder, other_sites, examples, TrainingPlan(1, 1, 1e-3)).restore(first.state())


def test_recomputing_gives_the_same_gradients(decoder: Decoder) -> None:
    kept, again = a_trainer(decoder), a_trainer(decoder)
    losses = [step.loss for step in kept.steps()]
    decoder.recompute = True
    assert [step.loss for step in again.steps()] == losses
    for mine, other in zip(weights_of(kept), weights_of(again), strict=True):
        assert np.array_equal(mine, other)


def test_preferences_are_learnt(decoder: Decoder) -> None:
    examples = some_examples(width=2)
    trainer = a_trainer(decoder, examples, epochs=12, validation=examples, rate=1e-2)
    before = trainer.validate()
    assert before is not None
    assert before.loss == pytest.approx(np.log(2), abs=1e-5)  # nothing differs from the base model yet
    assert before.margin == 0
    list(trainer.steps())
    after = trainer.validate()
    assert after is not None
    assert after.loss < 0.5
    assert after.accuracy == 1
    assert after.margin > 0.5


def test_the_loss_of_preferences_is_the_papers(decoder: Decoder) -> None:
    """Equation 7 of arXiv 2305.18290, by hand, from plain logits."""
    examples = some_examples(width=2, count=3)
    trainer = a_trainer(decoder, examples, epochs=3, validation=examples)
    list(trainer.steps())
    found = trainer.validate()

    def likelihood(one: TrainingSequence, lora: Lora | None) -> float:
        batch = Batch.of([one])
        rows = decoder.logits(batch.packed, lora)[batch.places].log_softmax(1)
        return float(rows.gather(1, batch.targets[:, None]).sum())

    with torch.no_grad():
        rewards = [0.1 * (likelihood(one, trainer.lora) - likelihood(one, None)) for one in examples.sequences]
    margins = np.array(rewards[::2]) - np.array(rewards[1::2])
    assert found is not None
    assert found.loss == pytest.approx(float(np.log1p(np.exp(-margins)).mean()), rel=1e-3)
    assert found.margin == pytest.approx(float(margins.mean()), abs=1e-4)


def test_examples_without_an_answer_are_refused(decoder: Decoder) -> None:
    silent = TrainingSequence(np.arange(9, dtype=np.int32), np.zeros(9, bool))
    with pytest.raises(ConfigError, match="no answer to predict"):
        a_trainer(decoder, Examples((silent,), 1))


@pytest.mark.parametrize(
    "bad", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": float("nan")}, {"learning_rate": 0}, {"beta": -1.0}]
)
def test_plans_that_are_none(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        TrainingPlan(**{"epochs": 1, "batch_size": 1, "learning_rate": 1e-3, **bad})  # type: ignore[arg-type]
