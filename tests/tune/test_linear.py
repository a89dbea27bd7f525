"""Products with quantised matrices and their adapters, against torch's own on dense ones."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from edgellm.tune.linear import Part, products  # noqa: E402
from edgellm.tune.weights import BaseWeights  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama  # noqa: E402

NAMES = ("attn_q", "attn_k", "attn_v")
SCALE = 1.5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> BaseWeights:
    return BaseWeights(write_tiny_llama(tmp_path_factory.mktemp("linear") / "m.gguf", weights="q8_0"), threads=2)


def _parts(weights: BaseWeights, trained: tuple[bool, ...]) -> list[Part]:
    parts = []
    for index, (name, is_trained) in enumerate(zip(NAMES, trained, strict=True)):
        matrix = weights.matrix(f"blk.1.{name}.weight")
        pair = (torch.randn(3, matrix.columns) / 8, torch.randn(matrix.rows, 3) / 8)
        parts.append(
            Part(
                matrix,
                torch.randn(matrix.rows) if index == 1 else None,
                (pair[0].requires_grad_(), pair[1].requires_grad_()) if is_trained else None,
            )
        )
    return parts


def _dense(x: torch.Tensor, part: Part) -> torch.Tensor:
    y = x @ part.matrix.expand(x.dtype).T
    if part.bias is not None:
        y = y + part.bias.to(x.dtype)
    if part.pair is not None:
        a, b = (one.to(x.dtype) for one in part.pair)
        y = y + SCALE * (x @ a.T @ b.T)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [(True, True, True), (False, True, False), (False, False, False)])
def test_products_and_gradients(weights: BaseWeights, trained: tuple[bool, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = _parts(weights, trained)
    pairs = [tensor for part in parts for tensor in part.pair or ()]
    x = torch.randn(9, parts[0].matrix.columns).to(dtype).requires_grad_()
    wanted = [torch.randn(9, part.matrix.rows).to(dtype) for part in parts]
    found, expected = products(x, parts, SCALE), [_dense(x, part) for part in parts]
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.06}
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert torch.allclose(one, other, **near)
    ours, theirs = (torch.autograd.grad(ys, [x, *pairs], wanted) for ys in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).norm() / other.norm()) < (1e-5 if dtype == torch.float32 else 0.02)


def test_what_is_used_alone_has_its_gradient_alone(weights: BaseWeights) -> None:
    parts = _parts(weights, (True, False, True))
    x = torch.randn(4, parts[0].matrix.columns, requires_grad=True)
    _, _, v = products(x, parts, SCALE)
    v.sum().backward()
    (expected,) = torch.autograd.grad(_dense(x, parts[2]).sum(), x)
    assert torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-5)
    assert parts[0].pair is not None
    assert parts[0].pair[0].grad is None


def test_what_has_nothing_to_learn_has_no_graph(weights: BaseWeights) -> None:
    parts = _parts(weights, (False, True, False))
    frozen = torch.randn(4, parts[0].matrix.columns)
    assert [y.requires_grad for y in products(frozen, parts, SCALE)] == [False, True, False]
    assert [y.requires_grad for y in products(frozen.requires_grad_(), parts, SCALE)] == [True] * 3


def test_nothing_but_what_adapters_need_is_kept_for_backward(weights: BaseWeights) -> None:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        x = torch.randn(3, 64, requires_grad=True)
        products(x, _parts(weights, (False,) * 3), SCALE)
        assert kept == []
        products(x, _parts(weights, (True, False, False)), SCALE)
        assert sorted(tensor.numel() for tensor in kept) == sorted([x.numel(), 3 * 64, 64 * 3, 3 * 3])
