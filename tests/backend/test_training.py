"""What training computes natively against NumPy, for every set of kernels that this processor runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from edgellm.backend.training import Heads, Sight, TrainingKernels, available

Real = npt.NDArray[np.float64]


def to_halves(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """bfloat16, rounded to nearest, to even in the middle."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_floats(x: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (x.astype(np.uint32) << 16).view(np.float32)


class Kind:
    """A type of numbers: arrays of it, and how near results must be."""

    def __init__(self, halves: bool) -> None:
        self.halves = halves
        self.near = 2.0**-7 if halves else 3e-6

    def made(self, x: Real) -> npt.NDArray[np.generic]:
        plain = x.astype(np.float32)
        return to_halves(plain) if self.halves else plain

    def read(self, x: npt.NDArray[np.generic]) -> Real:
        return (to_floats(x) if self.halves else x).astype(np.float64)

    def empty(self, *shape: int) -> npt.NDArray[np.generic]:
        return np.full(shape, 0xFFFF, np.uint16) if self.halves else np.full(shape, np.nan, np.float32)

    def check(self, found: npt.NDArray[np.generic], expected: Real) -> None:
        assert np.allclose(self.read(found), expected, rtol=self.near, atol=self.near * np.abs(expected).max())


@pytest.fixture(params=["float32", "bfloat16"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param == "bfloat16")


@pytest.fixture(params=available())
def kernels(request: pytest.FixtureRequest) -> TrainingKernels:
    return TrainingKernels(2, request.param)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def slope(f: Callable[[Real], Real], x: Real, along: Real) -> Real:
    """The gradient of sum(f(x) * along) for an f of each element by itself."""
    step = 1e-6
    return (f(x + step) - f(x - step)) / (2 * step) * along


def test_rounding_is_that_of_the_type(kernels: TrainingKernels) -> None:
    """A head without a rotation is copied; one turned by nothing is read and written."""
    values = np.array([1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -2.5e38, 1e-40, np.inf, -0.0, np.nan], np.float32)
    halves = to_halves(values[:7])
    x, scale = values[None, :7].copy(), np.empty(1, np.float32)
    x[0, 5] = 1.0
    y = np.empty((1, 7), np.uint16)
    kernels.norm(x, np.ones(7, np.float32), 0.0, y, scale)
    assert np.array_equal(y[0], to_halves(x[0] * scale[0]))
    turned = np.empty((1, 1, 7), np.uint16)
    none = np.empty((1, 0), np.float32)
    kernels.turn(Heads(1, 1), halves.reshape(1, 1, 7), none, none, turned)
    assert np.array_equal(turned[0, 0], halves)


@pytest.mark.parametrize("columns", [1, 5, 64, 577])
def test_norm(kernels: TrainingKernels, kind: Kind, random: np.random.Generator, columns: int) -> None:
    rows, epsilon = 131, 1e-5
    x = random.standard_normal((rows, columns)).astype(np.float32)
    weight = random.standard_normal(columns).astype(np.float32)
    y, scale = kind.empty(rows, columns), np.empty(rows, np.float32)
    kernels.norm(x, weight, epsilon, y, scale)
    exact = x.astype(np.float64)
    root = np.sqrt((exact**2).mean(1, keepdims=True) + epsilon)
    assert np.allclose(scale, 1 / root[:, 0], rtol=1e-6)
    kind.check(y, exact / root * weight)

    along = kind.made(random.standard_normal((rows, columns)))
    weighted, found = kind.read(along) * weight, np.empty_like(x)
    kernels.norm_back(along, x, weight, scale, found)
    expected = weighted / root - exact * (weighted * exact).mean(1, keepdims=True) / root**3
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("gelu", [False, True])
def test_gate(kernels: TrainingKernels, kind: Kind, random: np.random.Generator, gelu: bool) -> None:
    def activation(x: Real) -> Real:
        if gelu:
            return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return x / (1 + np.exp(-x))

    n = 100_003
    gate, up, along = (kind.made(random.standard_normal(n) * 4) for _ in range(3))
    x, its_up, gradient = kind.read(gate), kind.read(up), kind.read(along)
    y, by_gate, by_up = (kind.empty(n) for _ in range(3))
    kernels.gate(gate, up, gelu, y)
    kind.check(y, activation(x) * its_up)
    kernels.gate_back(along, gate, up, gelu, by_gate, by_up)
    kind.check(by_gate, slope(activation, x, gradient * its_up))
    kind.check(by_up, activation(x) * gradient)


def test_a_gate_far_out(kernels: TrainingKernels, kind: Kind) -> None:
    gate = kind.made(np.array([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, np.nan]))
    one = kind.made(np.ones(8))
    y, by_gate, by_up = (kind.empty(8) for _ in range(3))
    kernels.gate(gate, one, False, y)
    kernels.gate_back(one, gate, one, False, by_gate, by_up)
    assert np.isnan([kind.read(part)[-1] for part in (y, by_gate, by_up)]).all()
    expected = np.maximum(kind.read(gate)[:-1], 0)
    assert np.allclose(kind.read(y)[:-1], expected)
    assert np.allclose(kind.read(by_up)[:-1], expected)
    assert np.allclose(kind.read(by_gate)[:-1], [0, 0, 0, 0.5, 1, 1, 1], atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [0, 3, 8])
def test_turn(kernels: TrainingKernels, kind: Kind, random: np.random.Generator, pairs: int, interleaved: bool) -> None:
    tokens, heads, share, width = 130, 6, 3, 17
    angles = random.uniform(0, 6, (tokens, pairs))
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    x = kind.made(random.standard_normal((tokens, heads, width)))
    exact = kind.read(x)
    order = np.arange(2 * pairs).reshape(-1, 2).T if interleaved else np.arange(2 * pairs).reshape(2, -1)
    one, two = exact[..., order[0]], exact[..., order[1]]
    expected = exact.copy()
    expected[..., order[0]] = one * np.cos(angles)[:, None] - two * np.sin(angles)[:, None]
    expected[..., order[1]] = two * np.cos(angles)[:, None] + one * np.sin(angles)[:, None]
    how = Heads(heads, share, interleaved)
    grouped, back = kind.empty(heads // share, tokens * share, width), kind.empty(tokens, heads, width)
    kernels.turn(how, x, cosine, sine, grouped)
    kind.check(grouped.reshape(heads // share, tokens, share, width).swapaxes(0, 1).reshape(x.shape), expected)
    kernels.turn(how, grouped, cosine, sine, back, back=True)
    kind.check(back, exact)


@pytest.mark.parametrize("window", [0, 1, 4])
def test_softmax(kernels: TrainingKernels, kind: Kind, random: np.random.Generator, window: int) -> None:
    groups, queries, share, past = 3, 70, 2, 5
    keys = past + queries + 1  # one that nobody sees
    sight = Sight(share, past, window, 0.7)
    scores = kind.made(random.standard_normal((groups, queries * share, keys)) * 30)
    exact = kind.read(scores) * sight.scale
    last = past + np.arange(queries * share)[:, None] // share
    seen = np.arange(keys) <= last
    if window:
        seen &= np.arange(keys) > last - window
    weights = np.exp(np.where(seen, exact, -np.inf) - np.where(seen, exact, -np.inf).max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    kernels.softmax(sight, scores)
    kind.check(scores, weights)
    assert not kind.read(scores)[:, ~seen].any()

    gradient = kind.made(random.standard_normal(scores.shape))
    by_weight, its = kind.read(gradient), kind.read(scores)
    kernels.softmax_back(sight, scores, gradient)
    kind.check(gradient, its * (by_weight - (its * by_weight).sum(2, keepdims=True)) * sight.scale)


def test_losses(kernels: TrainingKernels, kind: Kind, random: np.random.Generator) -> None:
    rows, vocabulary = 23, 1003
    logits = kind.made(random.standard_normal((rows, vocabulary)) * 6)
    exact = kind.read(logits)
    targets = random.integers(0, vocabulary, rows)
    targets[::2] = exact.argmax(1)[::2]
    untouched = logits.copy()
    losses, correct = np.empty(rows, np.float32), np.empty(rows, np.bool_)
    kernels.losses(logits, targets, losses, correct, gradient=False)
    assert np.array_equal(logits, untouched)
    probable = np.exp(exact - exact.max(1, keepdims=True))
    probable /= probable.sum(1, keepdims=True)
    assert np.allclose(losses, -np.log(probable[np.arange(rows), targets]), rtol=1e-5, atol=1e-5)
    assert np.array_equal(correct, exact.argmax(1) == targets)

    kernels.losses(logits, targets, losses, correct, gradient=True)
    probable[np.arange(rows), targets] -= 1
    kind.check(logits, probable)


def test_of_equal_logits_the_first_is_the_likeliest(kernels: TrainingKernels) -> None:
    logits = np.zeros((3, 50), np.float32)
    logits[:, 20] = logits[:, 30] = 1
    losses, correct = np.empty(3, np.float32), np.empty(3, np.bool_)
    kernels.losses(logits, np.array([20, 30, 0]), losses, correct, gradient=False)
    assert correct.tolist() == [True, False, False]


def test_what_does_not_belong_together_is_refused(kernels: TrainingKernels) -> None:
    def floats(*shape: int) -> npt.NDArray[np.float32]:
        return np.zeros(shape, np.float32)

    none, truth = np.zeros(0, np.float32), np.zeros(2, np.bool_)
    with pytest.raises(ValueError, match="sizes"):
        kernels.norm(floats(2, 8), floats(3), 0.0, floats(2, 8), floats(2))
    with pytest.raises(ValueError, match="sizes"):
        kernels.gate(floats(8), floats(7), False, floats(8))
    with pytest.raises(ValueError, match="sizes"):
        kernels.turn(Heads(3, 2), floats(2, 3, 4), floats(2, 2), floats(2, 2), floats(2, 3, 4))
    with pytest.raises(ValueError, match="sizes"):
        kernels.turn(Heads(2, 1), floats(2, 2, 4), floats(2, 3), floats(2, 3), floats(2, 2, 4))
    with pytest.raises(ValueError, match="sizes"):
        kernels.softmax(Sight(1, 1, 0, 1.0), floats(1, 4, 4))
    with pytest.raises(ValueError, match="sizes"):
        kernels.losses(floats(2, 5), np.array([0, 5]), floats(2), truth, gradient=False)
    with pytest.raises(TypeError):
        kernels.gate(floats(8), np.zeros(8), False, floats(8))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        kernels.gate(floats(16)[::2], floats(8), False, floats(8))
    kernels.gate(none, none, False, none)
    with pytest.raises(ValueError, match="no kernels named"):
        TrainingKernels(1, "abacus").gate(floats(8), floats(8), False, floats(8))
