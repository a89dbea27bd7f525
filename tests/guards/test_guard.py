"""The guard's own reasoning, over a classifier whose logits are fixed: one window is 4 words, "bad" is unsafe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import guards.guard
from guards import Guard, Rules, Turn
from guards.card import Card, Handicaps, Passing, Scale, Weights, sigmoid
from guards.classifier import Logits, Window
from guards.windows import windows

OUTPUTS = ("unsafe", "jailbreak", "violence")


class FixedClassifier:
    """Words are tokens. Logits of a window: its "bad"s, its "dan"s, its "punch"es, 4 for each, less 2."""

    def __init__(self, folder: Path) -> None:
        scales = {name: Scale() for name in OUTPUTS}
        levels = {"strict": 0.3, "balanced": 0.7}
        weights = Weights(1.0, 0.0)
        self.card = Card(
            version="test",
            outputs=OUTPUTS,
            scales=scales,
            thresholds=levels,
            jailbreak_threshold=0.5,
            foreign=Scale(2.0, -3.0),
            weights=weights,
            foreign_weights=weights,
            passing=Passing(0.0, 0.0, 0.0),
            handicaps=Handicaps(0.0, 0.0, 0),
            window_tokens=6,
            overlap_tokens=2,
        )
        self.computed = 0

    def words(self) -> list[str]:
        return ["how", "to", "be", "bad", "good"]

    def windows(self, text: str) -> list[Window]:
        words = text.split()
        spans = windows(len(words), size=4, overlap=2) if words else []
        return [
            Window(" ".join(words[a:b]), tuple(hash(word) for word in words[a:b]), "quel" in words[a:b])
            for a, b in spans
        ]

    def logits(self, found: Sequence[Window]) -> Iterator[tuple[Sequence[Window], list[Logits]]]:
        for begin in range(0, len(found), 2):
            batch = found[begin : begin + 2]
            self.computed += len(batch)
            counts = [[window.text.split().count(word) for word in ("bad", "dan", "punch")] for window in batch]
            yield batch, [Logits(row - 1, row) for row in 4 * np.array(counts, dtype=np.float32) - 2]


@pytest.fixture(autouse=True)
def _fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards.guard, "Classifier", FixedClassifier)


def computed(guard: Guard) -> int:
    classifier = guard._classifier
    assert isinstance(classifier, FixedClassifier)
    return classifier.computed


def test_a_verdict_says_what_decided() -> None:
    verdict = Guard().check("one two three bad")
    assert (verdict.label, verdict.unsafe) == ("unsafe", True)
    assert verdict.score == pytest.approx(sigmoid(2))
    assert verdict.window is not None
    assert (verdict.window.text, verdict.window.turn, verdict.window.undisguised) == ("one two three bad", 0, False)
    assert verdict.window.early_score == pytest.approx(sigmoid(1))
    assert not verdict.jailbreak
    assert verdict.categories["violence"] == pytest.approx(sigmoid(2) * sigmoid(-2))
    assert verdict.milliseconds > 0


@pytest.mark.parametrize(
    ("level", "label"), [("strict", "safe"), ("balanced", "safe"), (0.1, "unsafe"), (0.0, "unsafe")]
)
def test_levels(level: float, label: str) -> None:
    assert Guard(level).check("harmless").label == label


@pytest.mark.parametrize("level", ["lenient", -0.1, 1.5])
def test_levels_that_are_none(level: float) -> None:
    with pytest.raises(ValueError, match="not a"):
        Guard(level)


@pytest.mark.parametrize("place", [0, 7, 40, 99])
def test_padding_hides_nothing(place: int) -> None:
    words = ["fine"] * 99
    words.insert(place, "bad")
    verdict = Guard().check(" ".join(words))
    assert verdict.unsafe
    assert verdict.window is not None
    assert "bad" in verdict.window.text


@pytest.mark.parametrize("text", ["", "  \n ", "\u200b"])
def test_nothing_is_safe(text: str) -> None:
    verdict = Guard().check(text)
    assert (verdict.label, verdict.score, verdict.window) == ("safe", 0.0, None)


def test_a_jailbreak_is_a_flag_beside() -> None:
    verdict = Guard().check("dan do it please")
    assert (verdict.label, verdict.jailbreak) == ("safe", True)
    assert verdict.jailbreak_score == pytest.approx(sigmoid(2))


def test_what_stands_beneath_a_disguise_is_judged() -> None:
    verdict = Guard().check("aG93IHRvIGJlIGJhZA==")
    assert verdict.unsafe
    assert verdict.window is not None
    assert verdict.window.undisguised


def test_the_newest_turn_counts_most() -> None:
    guard = Guard()
    then = Turn("user", "bad"), Turn("assistant", "no")
    now = guard.check_turns([*then, Turn("user", "what is there that one may cook with beans")])
    assert now.score < guard.check("bad").score


def test_what_is_read_badly_counts_less() -> None:
    verdict = Guard().check("quel bad")
    assert verdict.score == pytest.approx(sigmoid(2 * 2 - 3))
    assert verdict.window is not None
    assert verdict.window.foreign


def test_the_operators_words_are_not_held_against_the_user() -> None:
    assert not Guard().check_turns([Turn("system", "bad"), Turn("user", "fine")]).unsafe


def test_tool_results_are_judged() -> None:
    turns = [Turn("user", "read it"), Turn("assistant", ""), Turn("tool", "bad")]
    verdict = Guard().check_turns(turns)
    assert verdict.unsafe
    assert verdict.window is not None
    assert verdict.window.turn == 2


def test_windows_that_were_seen_are_not_computed_again() -> None:
    guard = Guard()
    guard.check("one two three four five six")
    before = computed(guard)
    guard.check("one two three four five six")
    assert computed(guard) == before
    guard.check("seven")
    assert computed(guard) == before + 1


def test_judging_pauses_between_computations() -> None:
    pauses = list(Guard().judging([Turn("user", " ".join(map(str, range(20))))]))
    assert len(pauses) > 2


def test_a_block_rule_decides() -> None:
    verdict = Guard(rules=Rules(block=["forbidden fruit"])).check("Eat the FORBIDDEN  fruit")
    assert (verdict.label, verdict.score, verdict.rule) == ("unsafe", 1.0, "forbidden fruit")


def test_an_allow_rule_is_no_password() -> None:
    guard = Guard(rules=Rules(allow=["bad joke"]))
    assert guard.check("tell a bad joke").label == "safe"
    assert guard.check("tell a bad joke and be bad").label == "unsafe"
    assert guard.check("bad joke").score == 0.0


def test_a_block_rule_outranks_an_allow_rule() -> None:
    assert Guard(rules=Rules(allow=["x"], block=["x"])).check("x").unsafe
