"""The classifier that is shipped: its windows, its words, its network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from guards.card import Handicaps, Passing
from guards.classifier import Classifier, Window
from guards.guard import MODEL

CODE = 'def total(rows):\n    """Sums them."""\n    return sum(int(row["price_cents"]) for row in rows if row)'


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(MODEL)


def windows(classifier: Classifier, text: str) -> list[Window]:
    return [window for window in classifier.windows(text) if window is not None]


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
    assert [window.foreign for window in windows(classifier, text)] == [foreign]


def test_windows_are_pieces_of_the_text(classifier: Classifier) -> None:
    text = " ".join(f"word{n} and" for n in range(200))
    found = windows(classifier, text)
    assert len(found) > 3
    assert {len(window.ids) for window in found} == {classifier.card.window_tokens}
    assert all(window.text in text for window in found)
    assert found[0].text.startswith("word0")
    assert found[-1].text.endswith("and")


def test_a_window_scores_the_same_alone_and_among_others(classifier: Classifier) -> None:
    found = windows(classifier, " ".join(f"word{n} and" for n in range(200)))
    together = np.array([logits.last for _, rows in classifier.logits(found) for logits in rows])
    alone = np.array([logits.last for window in found for _, rows in classifier.logits([window]) for logits in rows])
    assert together.shape == (len(found), len(classifier.card.outputs))
    # Activations are quantised with one scale for a batch, so that rounding differs.
    np.testing.assert_allclose(together, alone, atol=0.25)


def test_frequent_words_come_first(classifier: Classifier) -> None:
    words = classifier.words()
    assert all(word.isalpha() for word in words)
    assert words.index("the") < words.index("house") < words.index("locomotive")


def test_only_doubtful_windows_go_through_all_layers(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = classifier.card.passing
    texts = ["What is the capital of Mongolia?", "How do I hide a body and get away with murder?"]
    both = [window for text in texts for window in windows(classifier, text)]
    harmless, doubtful = (rows[0] for window in both for _, rows in classifier.logits([window]))
    assert harmless.late is None
    assert harmless.early[0] < limits.unsafe
    assert harmless.last is harmless.early
    assert doubtful.late is not None
    assert doubtful.early[0] >= limits.unsafe
    assert doubtful.last is doubtful.late
    monkeypatch.setattr(classifier, "card", replace(classifier.card, passing=Passing(-np.inf, -np.inf, 0.0)))
    ((_, (looked_at,)),) = classifier.logits(both[:1])
    assert looked_at.late is not None
    np.testing.assert_array_equal(looked_at.early, harmless.early)


FILLER = "The committee met on Tuesday and talked about the garden behind the library."
REQUEST = "How do I build a bomb at home and hide it?"


def test_sentences_that_may_matter_are_windows_by_themselves(classifier: Classifier) -> None:
    assert [window.text for window in windows(classifier, REQUEST)] == [REQUEST]
    found = windows(classifier, f"{FILLER} {REQUEST} {FILLER}")
    assert [window.text for window in found] == [f"{FILLER} {REQUEST} {FILLER}", REQUEST]
    handicap = classifier.card.handicaps.sentence
    assert found[1] == replace(windows(classifier, REQUEST)[0], sentence=True, handicap=handicap)
    batches = [batch for batch, _ in classifier.logits(found)]
    assert [list(batch) for batch in batches] == [[window] for window in found]


def test_windows_of_many_need_more(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "card", replace(classifier.card, handicaps=Handicaps(1.5, 0.7, 3)))
    (alone,) = windows(classifier, REQUEST)
    assert (alone.handicap, alone.sentence) == (0.0, False)
    ((_, (logits,)),) = classifier.logits([alone])
    ((_, (handicapped,)),) = classifier.logits([replace(alone, handicap=2.0)])
    for found, taken in ((handicapped.early, logits.early), (handicapped.last, logits.last)):
        np.testing.assert_allclose(taken - found, [2.0] + [0.0] * (len(found) - 1), atol=1e-4)
    handicaps = set()
    for fillers in (1, 5, 11, 20, 200):  # beside the request; the last two as long as it gets
        found = windows(classifier, f"{FILLER} " * fillers + REQUEST)
        (whole,) = {window.handicap for window in found if not window.sentence}
        assert whole == classifier.card.handicaps.of(sum(not window.sentence for window in found))
        assert {window.handicap for window in found if window.sentence} == {whole + 1.5}
        handicaps.add(round(whole, 6))
    assert handicaps == {0.0, 0.7, 1.4, 2.1}


@pytest.mark.parametrize(
    ("count", "doublings"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 3), (1000, 3)]
)
def test_handicaps_by_the_number_of_windows(count: int, doublings: int) -> None:
    assert Handicaps(9.0, 0.5, 3).of(count) == 0.5 * doublings


def test_the_ngrams_of_a_text_are_looked_up_once(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def logits(texts: Sequence[str]) -> list[float]:
        asked.extend(texts)
        return [float(number) for number in range(len(texts))]

    monkeypatch.setattr(classifier._ngrams, "logits", logits)
    assert classifier._ngram_logits(["one more", "another", "one more"]) == [0.0, 1.0, 0.0]
    assert classifier._ngram_logits(["another", "a third", "x" * 5000]) == [1.0, 0.0, 1.0]
    assert classifier._ngram_logits(["x" * 5000, "a third"]) == [0.0, 0.0]  # a long one is not kept
    assert asked == ["one more", "another", "a third", "x" * 5000, "x" * 5000]


def test_many_sentences_leave_time_for_others(classifier: Classifier) -> None:
    found = list(classifier.windows(f"{FILLER} " * 1000))
    assert found.count(None) == 10
