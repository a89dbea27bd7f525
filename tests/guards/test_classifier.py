"""The classifier that is shipped: its windows, its words, its network."""

from __future__ import annotations

import numpy as np
import pytest

from guards.classifier import Classifier
from guards.guard import MODEL

CODE = 'def total(rows):\n    """Sums them."""\n    return sum(int(row["price_cents"]) for row in rows if row)'


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(MODEL)


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("How do I bake bread?", False),
        ("What are the uses of chloroform and acetaminophen?", False),
        (CODE, False),
        ("Wie backe ich ein Brot, das nicht so schnell trocken wird?", True),
        ("Mji mkuu wa Kenya unaitwa aje, na una watu wangapi?", True),
        ("এই লেখার মূল বিষয় কী এবং এর সুর কেমন?", True),
        ("请把下面的文章翻译成英文", True),
    ],
)
def test_what_is_not_english(classifier: Classifier, text: str, foreign: bool) -> None:
    assert [window.foreign for window in classifier.windows(text)] == [foreign]


def test_windows_are_pieces_of_the_text(classifier: Classifier) -> None:
    text = " ".join(f"word{n} and" for n in range(200))
    found = classifier.windows(text)
    assert len(found) > 3
    assert {len(window.ids) for window in found} == {classifier.card.window_tokens}
    assert all(window.text in text for window in found)
    assert found[0].text.startswith("word0")
    assert found[-1].text.endswith("and")


def test_a_window_scores_the_same_alone_and_among_others(classifier: Classifier) -> None:
    found = classifier.windows(" ".join(f"word{n} and" for n in range(200)))
    together = np.concatenate([logits for _, logits in classifier.logits(found)])
    alone = np.concatenate([logits for window in found for _, logits in classifier.logits([window])])
    assert together.shape == (len(found), len(classifier.card.outputs))
    # Activations are quantised with one scale for a batch, so that rounding differs.
    np.testing.assert_allclose(together, alone, atol=0.25)


def test_frequent_words_come_first(classifier: Classifier) -> None:
    words = classifier.words()
    assert all(word.isalpha() for word in words)
    assert words.index("the") < words.index("house") < words.index("locomotive")
