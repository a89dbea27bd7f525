"""The drafter's forward pass against llama.cpp's, what training does, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from edgellm.errors import StorageError  # noqa: E402
from edgellm.models.describe import describe  # noqa: E402
from edgellm.models.ggml_types import GGML_TYPES  # noqa: E402
from edgellm.tune.draft.distil import Course, Distiller, Look  # noqa: E402
from edgellm.tune.draft.net import Net  # noqa: E402
from edgellm.tune.draft.samples import Sample  # noqa: E402
from edgellm.tune.prefix_tree import pack  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama  # noqa: E402
from tests.tune.rig import TEXT, divergence, true_logits  # noqa: E402

TOKENS = list(TEXT)
_KINDS = {kind.name: kind for kind in GGML_TYPES.values()}
SAMPLES = [Sample([*b"say it: ", *word * 4], 8) for word in (b"hello ", b"world ", b"true ", b"false ")]


def _logits(net: Net) -> torch.Tensor:
    with torch.no_grad():
        return net.logits(pack([TOKENS]), torch.arange(len(TOKENS)))


def _distiller(path: Path, course: Course) -> Distiller:
    return Distiller(Net(path), SAMPLES[:3], SAMPLES[3:], course)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_llama_cpp(tmp_path: Path, architecture: str, tied: bool) -> None:
    path = write_tiny_llama(
        tmp_path / "m.gguf", architecture=architecture, layers=3, tied=tied, norm_spread=0.5, seed=3
    )
    expected, found = true_logits(path, TOKENS), _logits(Net(path))
    assert torch.allclose(found, expected, atol=3e-3 * float(expected.std()) + 2e-2)
    kl, agreement = divergence(expected, found)
    assert kl < 1e-4
    assert agreement >= 0.97


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_weight_has_a_gradient(tmp_path: Path, architecture: str) -> None:
    net = Net(write_tiny_llama(tmp_path / "m.gguf", architecture=architecture))
    net.logits(pack([TOKENS]), torch.arange(len(TOKENS))).log_softmax(1)[:, 65].sum().backward()
    for name, weight in net.weights.items():
        assert weight.grad is not None, name
        assert bool(weight.grad.any()), name


def test_the_gradient_of_a_weight_is_its_effect(tmp_path: Path) -> None:
    net = Net(write_tiny_llama(tmp_path / "m.gguf", seed=5, norm_spread=0.5))

    def loss() -> torch.Tensor:
        return net.logits(pack([TOKENS]), torch.arange(len(TOKENS))).log_softmax(1)[:, 104].mean()

    loss().backward()
    for name in ("token_embd.weight", "blk.0.attn_k.weight", "blk.1.ffn_up.weight", "blk.1.attn_norm.weight"):
        weight = net.weights[name]
        direction = weight.grad / weight.grad.norm()
        with torch.no_grad():
            weight += 1e-2 * direction
            up = float(loss())
            weight -= 2e-2 * direction
            down = float(loss())
            weight += 1e-2 * direction
        assert (up - down) / 2e-2 == pytest.approx(float(weight.grad.norm()), rel=0.05), name


def test_training_learns_and_tells(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", seed=1)
    looks: list[Look] = []
    distiller = Distiller(Net(path), SAMPLES, [], Course(epochs=30, pack_tokens=64, learning_rate=3e-3))
    first, best = distiller.run(looks.append)
    assert (looks[0], looks[-1].step) == (first, distiller.steps)
    assert best.loss < 0.2 * first.loss
    assert best.right > 0.9 > 0.2 > first.right
    assert best in looks
    assert best.right == max(look.right for look in looks)
    again = distiller.look(0)  # the weights are the best ones
    assert (again.loss, again.right) == pytest.approx((best.loss, best.right))


def test_a_worse_end_is_not_kept(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", seed=1)
    distiller = _distiller(path, Course(epochs=20, pack_tokens=32, learning_rate=30.0))  # it diverges
    before = [weight.clone() for weight in distiller.net.parameters()]
    first, best = distiller.run(lambda look: None)
    if best is first:
        assert all(map(torch.equal, before, distiller.net.parameters()))
    assert best.right >= first.right
    assert distiller.look(0).right == best.right


def test_stopping_keeps_what_was_reached(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", seed=1)
    distiller = _distiller(path, Course(epochs=50, pack_tokens=32, learning_rate=3e-3))
    asked = iter([False] * 12)
    looks: list[Look] = []
    first, best = distiller.run(looks.append, lambda: next(asked, True))
    assert looks[-1].step == 12
    assert best.loss < first.loss


def test_without_time_nothing_is_trained(tmp_path: Path) -> None:
    distiller = _distiller(write_tiny_llama(tmp_path / "m.gguf"), Course(epochs=5, time_s=1e-9))
    first, best = distiller.run(lambda look: None)
    assert best is first


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", seed=1)
    found = []
    for seed in (0, 0, 1):
        distiller = _distiller(path, Course(epochs=3, pack_tokens=64, seed=seed))
        distiller.run(lambda look: None)
        found.append(distiller.net.weights["blk.0.ffn_up.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(("kind", "most"), [("Q8_0", 1e-3), ("Q4_1", 0.2), ("Q4_0", 0.3)])
def test_what_is_written_is_what_was_trained(tmp_path: Path, kind: str, most: float) -> None:
    distiller = _distiller(write_tiny_llama(tmp_path / "m.gguf", seed=1), Course(epochs=40, learning_rate=3e-3))
    distiller.run(lambda look: None)
    path = tmp_path / "out.gguf"
    distiller.net.save(path, _KINDS[kind], name="My drafter")
    kl, _ = divergence(_logits(distiller.net), true_logits(path, TOKENS))
    assert kl < most
    info = describe(path)
    assert (info.name, info.quantisation, set(info.matrix_bytes)) == ("My drafter", kind, {kind})
    before, _ = divergence(true_logits(tmp_path / "m.gguf", TOKENS), true_logits(path, TOKENS))
    assert before > 3 * kl  # it is not the model that it was


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    net = Net(write_tiny_llama(tmp_path / "m.gguf"))
    with pytest.raises(StorageError, match="cannot be written"):
        net.save(tmp_path / "file" / "out.gguf", _KINDS["Q8_0"], name="x")
