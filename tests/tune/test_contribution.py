"""The contribution analysis against a step taken in truth on each matrix by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgellm.tune.batches import Batch, Examples  # noqa: E402
from edgellm.tune.coding import TrainingSequence  # noqa: E402
from edgellm.tune.contribution import analyse  # noqa: E402
from edgellm.tune.decoder import Decoder  # noqa: E402
from edgellm.tune.lora import Lora, LoraConfig  # noqa: E402
from edgellm.tune.loss import token_losses  # noqa: E402
from edgellm.tune.planner import Analysis  # noqa: E402
from edgellm.tune.scheme import Site, every_site  # noqa: E402
from edgellm.tune.weights import BaseWeights  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama  # noqa: E402

CONFIG = LoraConfig(rank=4)


def alike(seed: int, count: int) -> Examples:
    """Sequences with something in common: each token is followed by its neighbour."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        tokens = ((draw.integers(0, 250) + np.arange(24)) % 250).astype(np.int32)
        mask = np.ones(24, bool)
        mask[0] = False
        made.append(TrainingSequence(tokens, mask))
    return Examples(tuple(made), 1)


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    return Decoder(BaseWeights(write_tiny_llama(tmp_path / "model.gguf", layers=3)), dtype=torch.float32)


def loss(decoder: Decoder, lora: Lora, examples: Examples) -> float:
    batch = Batch.of(examples.sequences)
    with torch.no_grad():
        stream = decoder.hidden(batch.packed, lora)
        return float(token_losses(decoder.normalise(stream[batch.places]), decoder.head, batch.targets).losses.sum())


def gain_of_a_step(decoder: Decoder, site: Site, learn: Examples, other: Examples, rate: float) -> float:
    """What one step of Adam on this matrix alone gains on examples it has not seen, by the rate."""
    lora = Lora(decoder.shape, [site], CONFIG)
    # The analysis draws A for all matrices in turn: take the same.
    lora.pairs[site][0].data.copy_(Lora(decoder.shape, every_site(3), CONFIG).pairs[site][0])
    before = loss(decoder, lora, other)
    batch = Batch.of(learn.sequences)
    stream = decoder.hidden(batch.packed, lora)
    token_losses(decoder.normalise(stream[batch.places]), decoder.head, batch.targets).losses.sum().backward()
    b = lora.pairs[site][1]
    assert b.grad is not None
    with torch.no_grad():
        b.sub_(rate * b.grad.sign())
    return (before - loss(decoder, lora, other)) / rate


def test_it_foresees_what_a_step_on_one_matrix_gains(decoder: Decoder) -> None:
    examples = alike(0, 16)
    found = analyse(decoder, examples, CONFIG, pack_tokens=100)
    assert found.tokens == 16 * 24
    order = [int(number) for number in np.random.default_rng(0).permutation(16)]
    halves = [Examples(tuple(examples.sequences[number] for number in half), 1) for half in (order[::2], order[1::2])]
    for site in every_site(3):
        both = sum(gain_of_a_step(decoder, site, halves[way], halves[1 - way], 1e-5) for way in (0, 1))
        assert found.gains[site] == pytest.approx(both, rel=0.2, abs=0.02 * max(found.gains.values()))
    assert len({round(gain, 6) for gain in found.gains.values()}) == 21


def test_noise_gains_less_than_what_examples_share(decoder: Decoder) -> None:
    draw = np.random.default_rng(1)
    noise = Examples(
        tuple(TrainingSequence(draw.integers(0, 250, 24).astype(np.int32), np.arange(24) > 0) for _ in range(16)),
        1,
    )
    shared = sum(analyse(decoder, alike(0, 16), CONFIG, pack_tokens=100).gains.values())
    nothing = sum(analyse(decoder, noise, CONFIG, pack_tokens=100).gains.values())
    assert nothing < 0.5 * shared


def test_it_leaves_the_decoder_as_it_was_and_comes_out_the_same(decoder: Decoder) -> None:
    first, second = (
        analyse(decoder, alike(0, 8), CONFIG, pack_tokens=64, recompute=recompute) for recompute in (True, False)
    )
    assert first == second
    assert not decoder.recompute


def test_an_analysis_is_kept_for_its_model(tmp_path: Path) -> None:
    kept = Analysis({site: 0.5 + site.layer for site in every_site(3)}, 1e9)
    kept.write(tmp_path / "a.json")
    assert Analysis.read(tmp_path / "a.json", 3) == kept
    assert Analysis.read(tmp_path / "a.json", 4) is None
    assert Analysis.read(tmp_path / "none.json", 3) is None
    (tmp_path / "a.json").write_text("[1]")
    assert Analysis.read(tmp_path / "a.json", 3) is None
