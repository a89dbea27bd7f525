"""The chunked loss against soft targets, compared with torch's over the whole matrix of logits."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from edgellm.tune import loss as loss_module  # noqa: E402
from edgellm.tune.soft_loss import SoftTargets, soft_losses  # noqa: E402
from edgellm.tune.weights import BaseWeights, Matrix  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama  # noqa: E402

PLACES, VOCABULARY = 11, 1000


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    path = write_tiny_llama(tmp_path_factory.mktemp("soft") / "m.gguf", vocab=VOCABULARY, layers=1, weights="q8_0")
    return BaseWeights(path).matrix("output.weight")


def some_targets(seed: int = 0) -> SoftTargets:
    """Of none to five tokens a place, of all, some or none of the probability; one place has a single sure token."""
    random = torch.Generator().manual_seed(seed)
    rows, tokens, probabilities = [], [], []
    written = torch.randint(0, VOCABULARY, (PLACES,), generator=random)
    for place in range(PLACES):
        count = place % 6
        chosen = torch.randperm(VOCABULARY, generator=random)[:count]
        share = torch.rand(count, generator=random) + 0.01
        whole = (1.0, 0.7)[place % 2]
        if place == 1:
            chosen, whole = written[1:2], 1.0
        rows += [place] * count
        tokens += chosen.tolist()
        probabilities += (share / share.sum() * whole).tolist()
    weights = torch.rand(PLACES, generator=random)
    return SoftTargets(written, weights, torch.tensor(rows), torch.tensor(tokens), torch.tensor(probabilities))


def dense_losses(hidden: Tensor, head: Matrix, targets: SoftTargets) -> Tensor:
    """The slow reference: every probability is there, and autograd goes through all of them."""
    q = (hidden @ head.expand(torch.float32).T).double().softmax(1)
    losses = []
    for place in range(len(hidden)):
        mine = targets.rows == place
        p, chosen = targets.probabilities[mine].double(), q[place, targets.tokens[mine]]
        others = torch.ones(VOCABULARY, dtype=torch.bool)
        others[targets.tokens[mine]] = False
        p = torch.cat((p, (1 - p.sum()).clamp(min=0)[None]))
        chosen = torch.cat((chosen, q[place, others].sum()[None]))
        losses.append(targets.weights[place] * -(torch.special.entr(p) + p * chosen.log()).sum())
    return torch.stack(losses).float()


@pytest.mark.parametrize(("block", "logits_bytes"), [(8192, 1 << 20), (300, 3 * 4000), (64, 1)])
def test_losses_and_gradients(head: Matrix, monkeypatch: pytest.MonkeyPatch, block: int, logits_bytes: int) -> None:
    monkeypatch.setattr(loss_module, "_BLOCK_ROWS", block)
    torch.manual_seed(1)
    hidden, targets, scale = torch.randn(PLACES, head.columns), some_targets(), torch.rand(PLACES)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found = soft_losses(ours, head, targets, logits_bytes=logits_bytes)
    expected = dense_losses(theirs, head, targets)
    assert torch.allclose(found.losses, expected, atol=1e-5)
    (found.losses * scale).sum().backward()
    (expected * scale).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert float(theirs.grad.abs().max()) > 0.1
    assert torch.equal(found.correct, (hidden @ head.expand(torch.float32).T).argmax(1) == targets.written)


def test_a_sure_token_is_cross_entropy(head: Matrix) -> None:
    hidden, written = torch.randn(5, head.columns), torch.tensor([3, 999, 0, 17, 4])
    targets = SoftTargets(written, torch.full((5,), 0.2), torch.arange(5), written, torch.ones(5))
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = 0.2 * cross_entropy(theirs @ head.expand(torch.float32).T, written, reduction="none")
    found = soft_losses(ours, head, targets).losses
    assert torch.allclose(found, expected, atol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_nothing_is_wanted_where_all_is_lumped_or_reached(head: Matrix) -> None:
    hidden = torch.randn(2, head.columns, requires_grad=True)
    q = (hidden.detach()[:1] @ head.expand(torch.float32).T).softmax(1)[0]
    tokens = q.topk(4).indices
    rows, written = torch.zeros(4, dtype=torch.int64), torch.tensor([5, 6])
    found = soft_losses(hidden, head, SoftTargets(written, torch.ones(2), rows, tokens, q[tokens])).losses
    assert torch.allclose(found, torch.zeros(2), atol=1e-6)
    found.sum().backward()
    assert torch.allclose(hidden.grad, torch.zeros_like(hidden), atol=1e-5)


def test_logits_far_apart_stay_finite(head: Matrix) -> None:
    hidden = (40 * torch.randn(4, head.columns)).requires_grad_()
    likeliest = (hidden.detach() @ head.expand(torch.float32).T).argmax(1)
    p = torch.full((4,), 0.25)
    found = soft_losses(hidden, head, SoftTargets(likeliest, torch.ones(4), torch.arange(4), likeliest, p)).losses
    found.sum().backward()
    assert found.isfinite().all()
    assert hidden.grad.isfinite().all()


def test_half_floats_stay_near(head: Matrix) -> None:
    torch.manual_seed(2)
    hidden, targets = torch.randn(PLACES, head.columns), some_targets(1)
    ours, theirs = hidden.bfloat16().requires_grad_(), hidden.clone().requires_grad_()
    found, expected = soft_losses(ours, head, targets).losses, dense_losses(theirs, head, targets)
    assert torch.allclose(found, expected, atol=0.1)
    found.sum().backward()
    expected.sum().backward()
    assert float((ours.grad.float() - theirs.grad).norm() / theirs.grad.norm()) < 0.03


def test_no_gradient_is_made_where_none_is_wanted(head: Matrix) -> None:
    hidden, targets = torch.randn(PLACES, head.columns), some_targets()
    assert not soft_losses(hidden, head, targets).losses.requires_grad
    with torch.no_grad():
        assert not soft_losses(hidden.requires_grad_(), head, targets).losses.requires_grad
