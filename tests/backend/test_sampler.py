"""The sampler against a slow reference in double precision, and against llama.cpp's own samplers.

At a very high temperature every token that truncation leaves is equally probable, so that enough draws show exactly
which tokens are left: of 60 at most, 6,000 draws miss one with a probability of 60 * (59/60)**6000 < 1e-41.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from edgellm import _kernels
from edgellm.backend.library import lib

OFF: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "repetition_window": 64,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "bias": [],
    "seed": 7,
}
HOT = 1e6


def sampler(n: int, **given: Any) -> Any:
    return _kernels.Sampler(n, **{**OFF, **given})


def draws(logits: np.ndarray, count: int, refused: list[int] | None = None, **given: Any) -> np.ndarray:
    one = sampler(len(logits), **given)
    return np.array([one.draw(logits.ctypes.data, refused or []) for _ in range(count)])


def random_logits(n: int, seed: int, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, n).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(weights / weights.sum())


def reference_support(logits: np.ndarray, top_k: int, typical_p: float, top_p: float, min_p: float) -> set[int]:
    """The tokens that truncation leaves, by the definitions. Raises _TooCloseError."""
    kept = np.argsort(-logits, kind="stable")
    if top_k:
        kept = kept[:top_k]
    if typical_p < 1:
        p = softmax(logits[kept])
        distance = np.abs(-np.log(p) + (p * np.log(p)).sum())
        order = np.argsort(distance, kind="stable")
        kept = kept[order[: _fewest(p[order], typical_p, distance[order])]]
    if top_p < 1:
        kept = kept[np.argsort(-logits[kept], kind="stable")]
        kept = kept[: _fewest(softmax(logits[kept]), top_p)]
    if min_p > 0:
        margin = logits[kept] - logits[kept].max() - np.log(min_p)
        _clear(np.abs(margin) > 1e-4)
        kept = kept[margin >= 0]
    return set(kept.tolist())


class _TooCloseError(Exception):
    """Single precision may decide otherwise."""


def _clear(apart: np.ndarray) -> None:
    if not np.all(apart):
        raise _TooCloseError


def _fewest(p: np.ndarray, wanted: float, key: np.ndarray | None = None) -> int:
    total = np.cumsum(p)
    _clear(np.abs(total - wanted) > 1e-5)
    if key is not None:
        _clear(np.diff(key) > 1e-6)
    return int(np.searchsorted(total, wanted)) + 1


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    seed=st.integers(0, 10_000),
    top_k=st.one_of(st.just(0), st.integers(1, 70)),
    typical_p=st.one_of(st.just(1.0), st.floats(0.1, 0.99)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 1.0)),
)
def test_what_truncation_leaves(n: int, seed: int, top_k: int, typical_p: float, top_p: float, min_p: float) -> None:
    logits = random_logits(n, seed)
    try:
        expected = reference_support(logits, top_k, typical_p, top_p, min_p)
    except _TooCloseError:
        reject()
    drawn = draws(logits, 6000, temperature=HOT, top_k=top_k, typical_p=typical_p, top_p=top_p, min_p=min_p)
    assert set(drawn.tolist()) == expected


@pytest.mark.parametrize("n", [49_152, 151_936, 1000, 257])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_top_p_of_a_whole_vocabulary(n: int, spread: float) -> None:
    """Nothing below the border is drawn, and 300 draws miss the lowest twentieth above it once in 5e6 times."""
    logits = random_logits(n, 3, spread)
    for given_p in (0.3, 0.9, 0.999):
        order = np.argsort(-logits, kind="stable")
        total = np.cumsum(softmax(logits)[order])
        kept = logits[order[: int(np.searchsorted(total, given_p)) + 1]]
        drawn = draws(logits, 300, temperature=HOT, top_p=given_p)
        # Single precision may move the border by some tokens of nearly the same logit.
        assert kept.min() - 1e-3 <= logits[drawn].min() <= np.quantile(kept, 0.05) + 1e-3


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_p": 0.9},
        {"top_k": 12},
        {"min_p": 0.05},
        {"typical_p": 0.8},
        {"bias": [(3, 2.0), (5, -1.0)]},
    ],
)
def test_tokens_come_as_often_as_they_should(given: dict[str, Any]) -> None:
    """Chi-square of 40,000 draws with a fixed seed; the bound is passed by chance once in 100,000 at most."""
    logits = random_logits(40, 11, 1.0)
    biased = logits.copy()
    for token, value in given.get("bias", []):
        biased[token] += np.float32(value)
    support = sorted(
        reference_support(
            biased,
            given.get("top_k", 0),
            given.get("typical_p", 1.0),
            given.get("top_p", 1.0),
            given.get("min_p", 0.0),
        )
    )
    expected = softmax(biased[support] / given.get("temperature", 1.0)) * 40_000
    counts = np.bincount(draws(logits, 40_000, **given), minlength=40)
    assert counts[support].sum() == 40_000
    chi2 = ((counts[support] - expected) ** 2 / expected).sum()
    freedom = len(support) - 1
    assert chi2 < freedom + 4.3 * np.sqrt(2 * freedom) + 12


def test_drawing_from_a_large_vocabulary_follows_the_distribution() -> None:
    """Total variation over 64 classes: with 50,000 draws chance makes about (64 / 50,000) ** 0.5 / 2 = 0.018."""
    logits = random_logits(151_936, 5, 3.0)
    classes = np.arange(len(logits)) % 64
    expected = np.bincount(classes, softmax(logits), 64)
    seen = np.bincount(classes[draws(logits, 50_000)], minlength=64) / 50_000
    assert np.abs(seen - expected).sum() / 2 < 0.03


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.zeros(1000, np.float32)
    logits[[700, 300, 900]] = 5
    assert set(draws(logits, 3, temperature=0.0)) == {300}
    assert set(draws(logits, 3, refused=[300, 700], temperature=0.0)) == {900}


@pytest.mark.parametrize(
    "given", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}, {"typical_p": 0.9}, {"min_p": 0.1}]
)
def test_what_is_refused_or_forbidden_is_never_drawn(given: dict[str, Any]) -> None:
    logits = random_logits(30, 1)
    refused = [int(token) for token in np.argsort(-logits)[:10]]
    forbidden = [(int(token), -np.inf) for token in np.argsort(-logits)[10:20]]
    drawn = set(draws(logits, 500, refused=refused, bias=forbidden, **given))
    assert not drawn & {*refused, *(token for token, _ in forbidden)}
    everything = list(range(30))
    assert set(draws(logits, 2, refused=everything, **given)) == {-1}


@pytest.mark.parametrize("given", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}])
def test_logits_that_are_no_numbers_are_noticed(given: dict[str, Any]) -> None:
    assert set(draws(np.full(50, np.nan, np.float32), 1, **given)) == {-2}
    infinite = np.zeros(50, np.float32)
    infinite[9] = np.inf
    assert set(draws(infinite, 1, **given)) == {-2}


def test_the_seed_decides() -> None:
    logits = random_logits(500, 2)
    assert np.array_equal(draws(logits, 50), draws(logits, 50))
    assert not np.array_equal(draws(logits, 50), draws(logits, 50, seed=8))


def _penalised_by_llama_cpp(logits: np.ndarray, tokens: list[int], window: int, *penalties: float) -> np.ndarray:
    low = lib()
    part = low.llama_sampler_init_penalties(len(logits), window, *penalties)
    for token in tokens:
        low.llama_sampler_accept(part, token)
    data = (low.llama_token_data * len(logits))(
        *(low.llama_token_data(id=i, logit=float(logit), p=0.0) for i, logit in enumerate(logits))
    )
    array = low.llama_token_data_array(data=data, size=len(logits), selected=-1, sorted=False)
    low.llama_sampler_apply(part, ctypes.byref(array))
    low.llama_sampler_free(part)
    return np.array([data[i].logit for i in range(len(logits))], np.float32)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.lists(st.integers(0, 19), max_size=40),
    repetition=st.sampled_from([1.0, 1.1, 1.5, 0.8]),
    presence=st.sampled_from([0.0, 0.5, -0.5]),
    frequency=st.sampled_from([0.0, 0.3, -0.2]),
)
def test_penalties_are_those_of_llama_cpp(
    seed: int, tokens: list[int], repetition: float, presence: float, frequency: float
) -> None:
    logits = random_logits(20, seed)
    ours = sampler(
        20, temperature=0.0, repetition_penalty=repetition, repetition_window=8,
        presence_penalty=presence, frequency_penalty=frequency,
    )  # fmt: skip
    for token in tokens:
        ours.accept(token)
    expected = _penalised_by_llama_cpp(logits, tokens, 8, repetition, 0.0, 0.0) if repetition != 1 else logits
    if presence or frequency:
        expected = _penalised_by_llama_cpp(expected, tokens, 1 << 16, 1.0, frequency, presence)
    ranked, refused = list(np.argsort(-expected, kind="stable")), []
    assume(np.all(np.abs(np.diff(np.sort(expected))) > 1e-5))
    for token in ranked:  # the whole order shows every penalised logit
        assert ours.draw(logits.ctypes.data, refused) == token
        refused.append(int(token))


@pytest.mark.parametrize("penalty", [1e-75, 1e-38, 1e38, 1e300])
def test_absurd_penalties_leave_numbers(penalty: float) -> None:
    logits = np.array([0.0, 4.0, -4.0, 1.0], np.float32)
    ours = sampler(4, repetition_penalty=penalty)
    for token in range(3):
        ours.accept(token)
    assert ours.draw(logits.ctypes.data, []) in range(4)


def test_the_prompt_counts_for_repetition_only() -> None:
    logits = np.array([5.0, 4.9, 1.0], np.float32)
    ours = sampler(3, temperature=0.0, repetition_penalty=2.0, presence_penalty=10.0)
    ours.remember(0)
    assert ours.draw(logits.ctypes.data, []) == 1  # 5 / 2 is less than 4.9
    assert ours.draw(logits.ctypes.data, [1]) == 0  # and no presence penalty was taken
    ours.accept(0)
    assert ours.draw(logits.ctypes.data, [1]) == 2
