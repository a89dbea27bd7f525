"""A dense model split into experts: the same while all are in use, with a router that finds those that matter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from moe.calibrate import layer_inputs
from moe.convert import DenseModel, check_shape, coarser, set_experts_used, write_moe
from moe.split import Floats, Layer, Split, SplitShape, activations, balanced_clusters, ridge, split_layer

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from tests.support.tiny_gguf import write_tiny_llama

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_moe"
TEXT = "hello world: the name of the user is to be true in 42 null and false ways, you know? "
SHAPE = SplitShape(shared=64, experts=6, expert_width=32)  # of the tiny model's 256 neurons


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    folder = tmp_path_factory.mktemp("dense")
    return DenseModel(write_tiny_llama(folder / "a.gguf", architecture="qwen2", width=128))


@pytest.fixture(scope="module")
def splits(dense: DenseModel) -> list[Split]:
    inputs = layer_inputs(dense.path, TEXT * 10, 256, dense.layers, lambda line: None)
    random = np.random.default_rng(0)
    return [split_layer(dense.layer(number), values, SHAPE, random) for number, values in enumerate(inputs)]


def logits(path: Path) -> Floats:
    model = Model(path)
    context = Context(model, ContextParams(256, 1, 64, 64, 1))
    tokens = model.vocab.tokenize(TEXT, add_special=False, parse_special=False)
    batch = Batch(64)
    batch.extend(tokens, 0, 0, outputs=len(tokens))
    context.decode(batch)
    found = np.stack([context.logits(row) for row in range(len(tokens))])
    context.close()
    model.close()
    return found


def test_all_experts_together_are_the_dense_model(tmp_path: Path, dense: DenseModel, splits: list[Split]) -> None:
    write_moe(tmp_path / "a.gguf", dense, splits, SHAPE, SHAPE.experts)
    plain, whole = logits(dense.path), logits(tmp_path / "a.gguf")
    np.testing.assert_allclose(whole, plain, atol=0.15)  # down is Q8_0, and weights are within 3 % of 1
    set_experts_used(tmp_path / "a.gguf", 1)
    assert np.abs(logits(tmp_path / "a.gguf") - plain).max() > 0.3


def test_each_neuron_has_one_place_and_the_hottest_are_shared(dense: DenseModel, splits: list[Split]) -> None:
    for split in splits:
        assert split.experts.shape == (6, 32)
        everything = np.concatenate([split.shared, split.experts.ravel()])
        assert sorted(everything.tolist()) == list(range(dense.neurons))


def test_the_router_finds_the_experts_that_matter() -> None:
    """Neurons of one expert answer to one direction; on new inputs the router must name that of the largest output."""
    random = np.random.default_rng(1)
    directions = np.linalg.qr(random.standard_normal((32, 32)))[0]  # (groups, width)
    group = np.arange(256) % 8  # of which the last four are hot: their output matrix is large
    gate = 3 * directions[group] + 0.05 * random.standard_normal((256, 32))
    down = random.standard_normal((32, 256)) * np.where(group < 4, 1, 10)
    layer = Layer(*(values.astype(np.float32) for values in (gate, gate, down)))
    split = split_layer(layer, random.standard_normal((2000, 32)).astype(np.float32), SplitShape(128, 4, 32), random)
    assert set(group[split.shared].tolist()) == {4, 5, 6, 7}
    assert [len(set(group[own].tolist())) for own in split.experts] == [1, 1, 1, 1]
    fresh = random.standard_normal((500, 32)).astype(np.float32)
    active = activations(layer, fresh)
    norms = np.stack([np.linalg.norm(active[:, own] @ layer.down[:, own].T, axis=1) for own in split.experts], axis=1)
    named = (fresh @ split.router.T).argmax(axis=1)
    assert (named == norms.argmax(axis=1)).mean() > 0.5  # chance is 0.25; 0.5 is 13 sigma above


def test_clusters_are_of_one_size_and_are_those_that_were_planted() -> None:
    random = np.random.default_rng(2)
    planted = np.arange(40) % 5
    points = random.standard_normal((5, 200))[planted] + 0.3 * random.standard_normal((40, 200))
    found = balanced_clusters(points.astype(np.float32), 5, random)
    assert found.shape == (5, 8)
    assert sorted(found.ravel().tolist()) == list(range(40))
    assert [len(set(planted[own].tolist())) for own in found] == [1] * 5


def test_ridge_recovers_a_linear_map() -> None:
    random = np.random.default_rng(3)
    inputs, true = random.standard_normal((500, 16)).astype(np.float32), random.standard_normal((4, 16))
    np.testing.assert_allclose(ridge(inputs, (inputs @ true.T).astype(np.float32)), true, atol=0.02)


def test_coarser_experts_hold_the_same_neurons() -> None:
    split = Split(np.arange(128), 128 + np.arange(64 * 32).reshape(64, 32), np.zeros((64, 8), np.float32))
    shape, (joined,) = coarser(SplitShape(128, 64, 32), [split])
    assert shape == SplitShape(128, 32, 64)
    assert joined.experts.shape == (32, 64)
    assert joined.router.shape == (32, 8)
    assert joined.experts[1].tolist() == split.experts[2:4].ravel().tolist()


@pytest.mark.parametrize(
    ("shape", "used"), [(SplitShape(64, 5, 32), 2), (SplitShape(0, 8, 32), 2), (SplitShape(16, 15, 16), 2), (SHAPE, 7)]
)
def test_impossible_splits_are_refused(shape: SplitShape, used: int) -> None:
    with pytest.raises(ValueError, match=r"must|uses"):
        check_shape(shape, used, 256)


def test_the_command(tmp_path: Path, dense: DenseModel) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 30)
    options = ["--shared=64", "--experts=6", "--experts-used=3", "--tokens=192", "--try-used=2,6,50", "--window=64"]
    command = [sys.executable, SCRIPT, dense.path, text, tmp_path / "moe.gguf", f"--measure={text}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    found = {name: part["perplexity"] for name, part in result["perplexity"].items()}
    assert list(found) == ["dense", "all, as 6 of 6", "2 of 6", "6 of 6"]
    assert found["all, as 6 of 6"] == pytest.approx(found["dense"], rel=0.02)
    assert found["6 of 6"] == found["all, as 6 of 6"]
    assert 0 < result["routing"]["overlap"] < 1
    used = gguf.GGUFReader(tmp_path / "moe.gguf").fields["glm4moe.expert_used_count"]
    assert used.contents() == 3
    for option, status, message in (("--experts=5", 2, "add up to 256"), ("--tokens=100000", 1, "are wanted")):
        refused = subprocess.run([*command, option], capture_output=True, text=True, check=False)
        assert refused.returncode == status
        assert message in refused.stderr
