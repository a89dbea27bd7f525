"""The guard: should this be answered?"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from guards.card import LEVELS, Level, sigmoid
from guards.categories import CATEGORIES
from guards.classifier import Classifier, Logits, Window
from guards.conversation import Part, Turn, parts
from guards.disguises import Undisguiser
from guards.recent import Recent
from guards.rules import Rules
from guards.text import clean, collapsed, visible
from guards.verdict import DecidingWindow, Verdict

MODEL = Path(__file__).parent / "model"
"""The classifier that comes with the package."""

_TOGETHER = 32  # windows that are handed to the classifier at once
_REMEMBERED = 4096  # windows whose logits are kept: a conversation that goes on is mostly what it was


@dataclass(slots=True)
class _Highest:
    """The highest log-odds so far."""

    unsafe: float = -np.inf
    jailbreak: float = -np.inf
    logits: Logits | None = None
    window: DecidingWindow | None = None


class Guard:
    """Judges texts and conversations. One thread at a time may use it.

    `level`: "strict" (5 % of harmless development prompts are held for unsafe), "balanced" (1 %), or a probability of
    one's own.
    """

    def __init__(
        self,
        level: Level | float = "balanced",
        *,
        rules: Rules | None = None,
        folder: Path = MODEL,
    ) -> None:
        """Raises GuardModelError; ValueError for a level that is none."""
        self._classifier = Classifier(folder)
        self.card = self._classifier.card
        if isinstance(level, str):
            if level not in LEVELS:
                raise ValueError(f"not a level: {level!r} (strict, balanced, or a probability)")
            self.threshold = self.card.thresholds[level]
        else:
            if not 0.0 <= level <= 1.0:
                raise ValueError(f"not a probability: {level!r}")
            self.threshold = float(level)
        self._rules = rules or Rules()
        self._undisguiser = Undisguiser(self._classifier.words())
        self._known: Recent[Window, Logits] = Recent(_REMEMBERED)

    def check(self, text: str) -> Verdict:
        """A text by itself, as a user would say it."""
        return self.check_turns([Turn("user", text)])

    def check_turns(self, turns: Sequence[Turn]) -> Verdict:
        """A conversation that is to be answered."""
        judging = self.judging(turns)
        while True:
            try:
                next(judging)
            except StopIteration as end:
                return cast(Verdict, end.value)

    def judging(self, turns: Sequence[Turn]) -> Generator[None, None, Verdict]:
        """The same in steps of a few windows, for a thread that judges several conversations by turns. `milliseconds`
        of the verdict counts the steps alone."""
        spent, begin = 0.0, time.perf_counter()
        highest = _Highest()
        for part in parts(turns):
            for text, undisguised in self._readings(part):
                rule = self._rules.blocking(text)
                if rule is not None:
                    spent += time.perf_counter() - begin
                    return self._blocked(rule.source, DecidingWindow(text, part.turn, undisguised), spent)
                for scored in self._scored(self._rules.judged(text)):
                    if scored is None:
                        spent += time.perf_counter() - begin
                        yield
                        begin = time.perf_counter()
                    else:
                        self._weigh(highest, *scored, part, undisguised)
        return self._verdict(highest, spent + time.perf_counter() - begin)

    def _readings(self, part: Part) -> Iterator[tuple[str, bool]]:
        """The text as it is, and what it may say beneath a disguise."""
        seen = visible(part.text)
        yield collapsed(seen), False
        beneath = self._undisguiser.undisguised(seen)
        if beneath is not None:
            yield clean(beneath), True

    def _scored(self, text: str) -> Iterator[tuple[Window, Logits] | None]:
        """The windows of a text with their logits; None after each computation: time for others."""
        unknown = []
        for window in self._classifier.windows(text):
            if window is None:
                yield None
                continue
            known = self._known.get(window)
            if known is None:
                unknown.append(window)
            else:
                yield window, known
            if len(unknown) == _TOGETHER:
                yield from self._computed(unknown)
                unknown = []
        yield from self._computed(unknown)

    def _computed(self, unknown: Sequence[Window]) -> Iterator[tuple[Window, Logits] | None]:
        for batch, rows in self._classifier.logits(unknown):
            for window, logits in zip(batch, rows, strict=True):
                self._known.keep(window, logits, window.text)
                yield window, logits
            yield None

    def _weigh(self, highest: _Highest, window: Window, logits: Logits, part: Part, undisguised: bool) -> None:
        scales = self.card.scales
        unsafe = self._unsafe(float(logits.last[0]), window) - part.handicap
        jailbreak = scales["jailbreak"].log_odds(float(logits.last[1])) - part.handicap
        highest.jailbreak = max(highest.jailbreak, jailbreak)
        if unsafe > highest.unsafe:
            highest.unsafe, highest.logits = unsafe, logits
            early = sigmoid(self._unsafe(float(logits.early[0]), window) - part.handicap)
            highest.window = DecidingWindow(window.text, part.turn, undisguised, window.foreign, early)

    def _unsafe(self, logit: float, window: Window) -> float:
        log_odds = self.card.scales["unsafe"].log_odds(logit)
        return self.card.foreign.log_odds(log_odds) if window.foreign else log_odds

    def _verdict(self, highest: _Highest, seconds: float) -> Verdict:
        score, jailbreak = sigmoid(highest.unsafe), sigmoid(highest.jailbreak)
        categories = {}
        if highest.logits is not None:
            for index, name in enumerate(self.card.outputs):
                if name in CATEGORIES:
                    given_unsafe = self.card.scales[name].probability(float(highest.logits.last[index]))
                    categories[name] = score * given_unsafe
        return Verdict(
            label="unsafe" if score > self.threshold else "safe",
            score=score,
            threshold=self.threshold,
            jailbreak=jailbreak > self.card.jailbreak_threshold,
            jailbreak_score=jailbreak,
            window=highest.window,
            categories=categories,
            milliseconds=1e3 * seconds,
        )

    def _blocked(self, rule: str, window: DecidingWindow, seconds: float) -> Verdict:
        return Verdict(
            label="unsafe",
            score=1.0,
            threshold=self.threshold,
            jailbreak=False,
            jailbreak_score=0.0,
            window=window,
            rule=rule,
            milliseconds=1e3 * seconds,
        )
