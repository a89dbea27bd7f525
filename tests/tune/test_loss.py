"""The chunked loss against torch's over the whole matrix of logits."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch.nn.functional import cross_entropy  # noqa: E402

from edgellm.tune import loss as loss_module  # noqa: E402
from edgellm.tune.loss import token_losses  # noqa: E402
from edgellm.tune.weights import BaseWeights, Matrix  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama  # noqa: E402


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    path = write_tiny_llama(tmp_path_factory.mktemp("loss") / "m.gguf", vocab=1000, layers=1, weights="q8_0")
    return BaseWeights(path).matrix("output.weight")


@pytest.mark.parametrize(("block", "logits_bytes"), [(8192, 1 << 20), (300, 3 * 4000), (64, 1)])
def test_losses_and_gradients(head: Matrix, monkeypatch: pytest.MonkeyPatch, block: int, logits_bytes: int) -> None:
    monkeypatch.setattr(loss_module, "_BLOCK_ROWS", block)
    torch.manual_seed(0)
    hidden, targets, weight = torch.randn(10, head.columns), torch.randint(0, 1000, (10,)), torch.rand(10)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    logits = theirs @ head.expand(torch.float32).T
    expected = cross_entropy(logits, targets, reduction="none")
    found = token_losses(ours, head, targets, logits_bytes=logits_bytes)
    assert torch.allclose(found.losses, expected, atol=1e-5)
    assert torch.equal(found.correct, logits.argmax(1) == targets)
    (found.losses * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_the_likeliest_is_correct(head: Matrix) -> None:
    hidden = torch.randn(6, head.columns)
    targets = (hidden @ head.expand(torch.float32).T).argmax(1)
    targets[2] = (targets[2] + 1) % 1000
    assert token_losses(hidden, head, targets).correct.tolist() == [True, True, False, True, True, True]


def test_half_floats_stay_near(head: Matrix) -> None:
    hidden, targets = torch.randn(40, head.columns), torch.randint(0, 1000, (40,))
    ours, theirs = hidden.bfloat16().requires_grad_(), hidden.clone().requires_grad_()
    found = token_losses(ours, head, targets).losses
    expected = cross_entropy(theirs @ head.expand(torch.float32).T, targets, reduction="none")
    assert torch.allclose(found, expected, atol=0.1)
    found.mean().backward()
    expected.mean().backward()
    assert float((ours.grad.float() - theirs.grad).norm() / theirs.grad.norm()) < 0.02


def test_no_gradient_is_made_where_none_is_wanted(head: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(loss_module, "_input_gradient", refuse)
    hidden, targets = torch.randn(5, head.columns), torch.arange(5)
    assert not token_losses(hidden, head, targets).losses.requires_grad
    with torch.no_grad():
        token_losses(hidden.requires_grad_(), head, targets)
    with pytest.raises(AssertionError):
        token_losses(hidden, head, targets)


def test_no_rows(head: Matrix) -> None:
    found = token_losses(torch.empty(0, head.columns, requires_grad=True), head, torch.empty(0, dtype=torch.int64))
    assert found.losses.shape == found.correct.shape == (0,)
    found.losses.sum().backward()


def test_no_tensor_is_as_large_as_the_logits(head: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for one in result if isinstance(result, tuple) else (result,):
                if isinstance(one, torch.Tensor):
                    largest = max(largest, one.numel())
            return result

    monkeypatch.setattr(loss_module, "_BLOCK_ROWS", 100)
    hidden = torch.randn(400, head.columns, requires_grad=True)
    with Watch():
        token_losses(hidden, head, torch.arange(400), logits_bytes=20 * 4000).losses.sum().backward()
    assert largest <= 400 * head.columns  # 25,600, where the logits would be 400,000
