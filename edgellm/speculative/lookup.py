"""Drafts without a model: what followed where the last tokens stood before.

Looked up in the prompt, in the answer so far, in earlier answers, and in the prediction that came with the request. Of
the places found, those with the most tokens in common vote on each drafted token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from edgellm.speculative.acceptance import Acceptance
from edgellm.speculative.proposer import Evidence, Guess, Prompt, Want
from edgellm.speculative.suffix_index import GAP, LONGEST, Match, SuffixIndex

_LOCAL_ORDER = 2
_HISTORY_ORDER = 2
_PREDICTION_ORDER = 1
_FORGETTING = 0.2
_SURE = 16  # the length that a prediction's next token counts as having in common
# Constant, then as `_evidence` has them: what was learned from 220 greedy answers of Qwen2.5-Coder-0.5B to GSM8K,
# HumanEval and self-instruct prompts, to edits of code and to texts that were to be repeated.
_WEIGHTS = (-1.1, 3.0, 2.7, 0.1, -1.4, 0.5, 2.0, -0.5)


class History:
    """The answers given lately. The oldest are forgotten by halves."""

    def __init__(self, capacity: int) -> None:
        """`capacity` in tokens; one takes about 60 bytes."""
        self._half = max(2, capacity // 2)
        self._younger = SuffixIndex(_HISTORY_ORDER)
        self._older = SuffixIndex(_HISTORY_ORDER)

    def __len__(self) -> int:
        return len(self._younger) + len(self._older)

    def add(self, answer: Sequence[int]) -> None:
        """Remembers an answer."""
        kept = answer[max(0, len(answer) - self._half + 1) :]
        if len(self._younger) + len(kept) >= self._half:
            self._older, self._younger = self._younger, SuffixIndex(_HISTORY_ORDER)
        self._younger.extend(kept)
        self._younger.extend((GAP,))

    def clear(self) -> None:
        """Forgets everything."""
        self._younger, self._older = SuffixIndex(_HISTORY_ORDER), SuffixIndex(_HISTORY_ORDER)

    def find(self, context: Sequence[int]) -> list[Match]:
        """Places before which the last tokens of `context` stand."""
        found = self._younger.find(context)
        return found if len(found) > 1 else found + self._older.find(context)


class Prediction:
    """What the client expects the answer to be, and how far the answer has come in it."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._index = SuffixIndex(_PREDICTION_ORDER, tokens)
        self._next = 0
        self._matched = _SURE  # tokens in common before `_next`; 0: the answer went another way

    def advance(self, token: int) -> None:
        """The answer went on with `token`."""
        text = self._index.text
        if self._matched and self._next < len(text) and text[self._next] == token:
            self._next += 1
            self._matched = min(LONGEST, self._matched + 1)
        else:
            self._matched = 0

    def find(self, context: Sequence[int]) -> list[Match]:
        """The place that the answer has come to; where it left the prediction, the one at which it may be back."""
        if not self._matched:
            found = self._index.find(context)
            if not found:
                return []
            # Of places that fit equally well, the next one after that where it left: edits mostly keep the order.
            best = max(found, key=lambda match: (match.length, match.place >= self._next, -match.place))
            self._next, self._matched = best.place, best.length
        return [Match(self._index.text, self._next, self._matched)] if self._next < len(self._index) else []


@dataclass(slots=True, eq=False)
class _State:
    """What belongs to one answer."""

    prompt: SuffixIndex  # shared by the answers to one prompt
    answer: SuffixIndex
    prediction: Prediction | None
    temperature: float
    record: float = 0.0  # how much oftener than foreseen this answer's guesses have fitted lately, -1 to 1


class Lookup:
    """The proposer that needs no model. One memory of earlier answers serves all."""

    name = "lookup"

    def __init__(self, history: History | None) -> None:
        """Without `history`, earlier answers are not remembered."""
        self.history = history
        self.acceptance = Acceptance(_WEIGHTS)

    def begin(self, prompt: Prompt) -> _State:
        """The state of an answer that is about to begin."""
        if prompt.shared is None:
            prompt.shared = SuffixIndex(_LOCAL_ORDER, prompt.tokens)
        expected = Prediction(prompt.prediction) if prompt.prediction else None
        return _State(prompt.shared, SuffixIndex(_LOCAL_ORDER), expected, prompt.temperature)

    def extend(self, state: _State, tokens: Sequence[int]) -> None:
        """The answer went on with `tokens`."""
        state.answer.extend(tokens)
        if state.prediction is not None:
            for token in tokens:
                state.prediction.advance(token)

    def propose(self, wants: Sequence[Want]) -> list[Guess | None]:
        """What followed where the last tokens stood before."""
        return [self._look_up(want.state, want.context[-LONGEST:], want) for want in wants]

    def _look_up(self, state: _State, context: Sequence[int], want: Want) -> Guess | None:
        expected = state.prediction.find(context) if state.prediction is not None else []
        local = state.answer.find(context) + state.prompt.find(context)
        earlier = self.history.find(context) if self.history is not None else []
        found = expected + local + earlier
        if not found:
            return None
        longest = max(match.length for match in found)
        best = [match for match in found if match.length == longest]
        source = 1 if best[0] in expected else 0 if best[0] in local else 2
        return self._follow(best, source, want)

    def _follow(self, matches: list[Match], source: int, want: Want) -> Guess | None:
        """Goes on from all places at once; those that do not go on as most of them do fall away."""
        tokens: list[int] = []
        evidence: list[Evidence] = []
        chances: list[float] = []
        together = 1.0
        length = matches[0].length
        places = [(match.text, match.place) for match in matches]
        while len(tokens) < want.limit and together >= want.least:
            going = [(text, place) for text, place in places if place < len(text) and text[place] != GAP]
            if not going:
                break
            token, votes = going[0][0][going[0][1]], 1
            if len(going) > 1:  # of those with equally many votes the first, which is the newest
                token, votes = Counter([text[place] for text, place in going]).most_common(1)[0]
            known = _evidence(min(LONGEST, length + len(tokens)), votes, len(going), source, want.state)
            evidence.append(known)
            chances.append(self.acceptance.probability(known))
            together *= chances[-1]
            tokens.append(token)
            places = [(text, place + 1) for text, place in going if text[place] == token]
        return Guess(tuple(tokens), tuple(evidence), tuple(chances)) if tokens else None

    def judge(self, state: _State, guess: Guess, fits: Sequence[bool]) -> None:
        """Learns how far such guesses can be trusted."""
        surprise = float(fits[0]) - self.acceptance.probability(guess.evidence[0])
        state.record += _FORGETTING * (surprise - state.record)
        for evidence, fit in zip(guess.evidence, fits, strict=False):
            self.acceptance.learn(evidence, fit)

    def end(self, _state: _State, answer: Sequence[int]) -> None:
        """Later answers may repeat this one."""
        if self.history is not None:
            self.history.add(answer)

    def forget(self) -> None:
        """Earlier answers, and how far guesses could be trusted."""
        if self.history is not None:
            self.history.clear()
        self.acceptance = Acceptance(_WEIGHTS)

    def close(self) -> None:
        """There is nothing to free."""


def _evidence(length: int, votes: int, voters: int, source: int, state: _State) -> Evidence:
    return (
        log2(length) / 5,
        log2((votes + 0.5) / (voters - votes + 0.5)) / 3,
        float(voters == 1),
        float(source == 2),
        float(source == 1),
        state.record,
        state.temperature,
    )
