"""The linear model beside the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from guards.errors import GuardModelError
from guards.ngrams import BITS, SIZES, SPAN, Ngrams, hashed


def test_ngrams_are_hashed() -> None:
    found = hashed("ab")  # with a space before and after: 3 pairs, 2 triples, one of four
    assert [len(features) for features in found] == [3, 2, 1, 0]
    again = hashed("abab")
    assert again[0][1] == again[0][3] == found[0][1]  # ab
    assert [list(features) for features in hashed("AB")] == [list(features) for features in found]
    assert len({*found[0], *found[1], *found[2]}) == 6
    assert len(hashed("\U0001f600\ud800ไทย")[3]) > 2  # any script, and what is no character
    assert [len(features) for features in hashed("")] == [1, 0, 0, 0]


@pytest.fixture
def ngrams() -> Ngrams:
    draw = np.random.default_rng(0)
    return Ngrams(draw.exponential(2, 1 << BITS), draw.normal(0, 1, 1 << BITS), -1.0)


def _whole(ngrams: Ngrams, text: str) -> float:
    (found,) = ngrams.logits([text])
    return found


def _logit(ngrams: Ngrams, padded: str) -> float:
    """Of one stretch, n-gram by n-gram."""
    features = [
        hashed(padded)[size - 2][begin + 1] for size in SIZES for begin in range(len(padded) - size + 1)
    ]  # of `hashed`, the first begins with a space of its own
    rarity, weights = (values[features].astype(float) for values in (ngrams.rarity, ngrams.weights))
    return ngrams.bias + float(rarity @ weights / np.sqrt(rarity @ rarity))


@pytest.mark.parametrize("length", [1, 5, 118, 119, 130, 198, 199, 300])
def test_the_highest_stretch_counts(ngrams: Ngrams, length: int) -> None:
    text = "".join(np.random.default_rng(length).choice(list("abcde "), length))
    padded = f" {text} "
    begins = [begin for begin in range(0, len(padded), SPAN // 2) if len(padded) - begin > 120]
    stretches = [padded, *(padded[begin : begin + SPAN] for begin in begins)]
    assert _whole(ngrams, text) == pytest.approx(max(_logit(ngrams, stretch) for stretch in stretches), rel=1e-3)


def test_of_what_is_not_known_the_bias_is_left() -> None:
    nothing = np.zeros(1 << BITS)
    assert Ngrams(nothing, nothing + 1, -1.5).logits(["anything at all"]) == [-1.5]
    assert Ngrams(nothing, nothing + 1, -1.5).logits([""]) == [-1.5]


def test_texts_together_are_as_each_by_itself(ngrams: Ngrams) -> None:
    texts = ["some words", "", "x" * 300, " and more of them" * 20, "some words", "é"]
    assert ngrams.logits(texts) == pytest.approx([_whole(ngrams, text) for text in texts], abs=1e-9)
    assert ngrams.logits([]) == []


def test_letters_that_small_ones_are_longer_than_hide_nothing(ngrams: Ngrams) -> None:
    assert len("\u0130".lower()) == 2
    text = "\u0130" * 30 + " and so on, to the end" * 6
    assert _whole(ngrams, text) == _whole(ngrams, text.lower())


def test_surroundings_do_not_thin_out() -> None:
    request = "how do i do this very thing" * 5
    filler = "committee met tuesday " * 20
    weights = np.zeros(1 << BITS)
    weights[np.concatenate(hashed(request))] = 1.0
    found = Ngrams(np.ones(1 << BITS), weights, 0.0)
    alone, among = _whole(found, request), _whole(found, filler + request + filler)
    whole = _logit(found, f" {filler + request + filler} ")
    assert whole < 0.5 * alone
    assert 0.7 * alone < among <= 1.2 * alone


def test_files(ngrams: Ngrams, tmp_path: Path) -> None:
    ngrams.write(tmp_path / "n.npz")
    again = Ngrams.read(tmp_path / "n.npz")
    assert again.bias == ngrams.bias
    np.testing.assert_array_equal(again.weights, ngrams.weights)
    np.testing.assert_array_equal(again.rarity, ngrams.rarity)
    np.savez(tmp_path / "half.npz", rarity=ngrams.rarity)
    for name in ("none.npz", "half.npz"):
        with pytest.raises(GuardModelError, match=name):
            Ngrams.read(tmp_path / name)
