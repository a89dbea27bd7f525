"""Tokens of a drafter's vocabulary as tokens of a target's, exact to the byte.

OmniDraft (arXiv 2507.02659, section 3.1) maps tokens for the same bytes directly, and runs of drafter tokens by a cache
of n-grams. A target writes nearly always what its own tokenizer makes of a text, so that here the target's tokenizer
has the first word: it also finds tokens that never came up before, and those that end inside a drafter token. Of eight
drafted tokens of real text 97 to 99.9 % are then what the target's tokenisation of the whole text has there; with the
cache alone it is 63 to 99.7 %, and with the cache before the tokenizer never more than with the tokenizer alone, but
down to 80 % for code. With the tokenizer the cache only tells which tokens the target has been seen to write.
"""

from __future__ import annotations

import enum
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.backend.vocab import TokenKind, Vocab
from edgellm.speculative.ngram_cache import NgramCache
from edgellm.speculative.spelling import Speller, speller_for, whole_characters


class Way(enum.Flag):
    """How a target token was found, and which of these a bridge may use."""

    DIRECT = enum.auto()  # one drafter token stands for the same bytes, or is the control token of the same name
    NGRAM = enum.auto()  # several drafter tokens, for which the target has written it before
    TEXT = enum.auto()  # the target's tokenizer makes it of the drafter's text


EVERY_WAY = Way.DIRECT | Way.NGRAM | Way.TEXT


@dataclass(frozen=True, slots=True)
class Mapped:
    """A target token that stands for drafted text."""

    token: int
    count: int  # drafter tokens touched from the first of the draft to the end of this token
    probability: float  # product over the drafter tokens that it is the first to touch; 1 if there are none
    way: Way


class Bridge:
    """From one drafter's tokens to one target's, and back by way of text. For one thread at a time."""

    def __init__(self, drafter: Vocab, target: Vocab, cache: NgramCache, *, ways: Way = EVERY_WAY) -> None:
        """Reads both vocabularies, a second or two for the largest. Raises ValueError if `ways` lacks Way.DIRECT."""
        if Way.DIRECT not in ways:
            raise ValueError("a bridge always maps tokens directly")
        self.cache = cache
        self.drafter, self.target = speller_for(drafter), speller_for(target)
        self._controls = _same_controls(drafter, target)
        #: For each drafter token the target token for the same bytes, or the control token of the same text; or -1.
        self.direct: array[int] = _same_pieces(self.drafter, self.target)
        for target_token, drafter_token in self._controls.items():
            self.direct[drafter_token] = target_token
        self._ngrams, self._texts = Way.NGRAM in ways, Way.TEXT in ways

    def to_drafter(self, data: bytes) -> list[int]:
        """Drafter tokens whose pieces join to `data`, inside a text: no BOS, no space in front, nothing is special.

        Empty if the drafter's vocabulary cannot spell `data`: some lack bytes that hardly a text has.
        """
        return self.drafter.spell(data) or []

    def control_to_drafter(self, token: int) -> int:
        """The drafter's control token of the same text as this one of the target's; -1 if there is none."""
        return self._controls.get(token, -1)

    def to_target(
        self, tokens: Sequence[int], probabilities: Sequence[float] | None = None, *, final: bool, held: bytes = b""
    ) -> list[Mapped]:
        """Target tokens for the drafter's `tokens`, up to the first that cannot be mapped.

        Their bytes are a prefix of the draft's, and so are those of each prefix of them. `probabilities` are the
        drafter's, one a token (None: all are 1). Unless `final`, more of the draft is to come: a last token that may
        turn out longer is left out then, but not one that maps directly. `held` is what the target has already written
        of the draft: the first bytes of a character. A draft that does not begin with it maps to nothing.
        """
        draft = _Draft(tokens, probabilities, held)
        pieces, size, start = self.drafter.pieces, len(tokens), 0
        while start < size:
            stop = start
            while stop < size and pieces[tokens[stop]]:
                stop += 1
            if stop > start and not self._map_text(draft, start, stop, ended=final or stop < size):
                break
            if stop < size:
                token = self.direct[tokens[stop]]
                if token < 0 or draft.held:
                    break
                draft.take(token, stop + 1, Way.DIRECT)
            start = stop + 1
        return draft.found

    def learn(self, target_tokens: Sequence[int]) -> None:
        """The target wrote these: files the runs of drafter tokens that stand for one of them in the cache."""
        pieces = self.target.pieces
        for is_text, part in itertools.groupby(target_tokens, lambda token: bool(pieces[token])):
            if is_text:
                self._learn_text(list(part))

    def _learn_text(self, target_tokens: list[int]) -> None:
        pieces, drafter_pieces = self.target.pieces, self.drafter.pieces
        run = self.drafter.spell(b"".join([pieces[token] for token in target_tokens]))
        if run is None:
            return
        end = reach = index = 0  # bytes of target tokens, of drafter tokens; drafter tokens so far
        for token in target_tokens:
            first, aligned = index, reach == end
            end += len(pieces[token])
            while reach < end:
                reach += len(drafter_pieces[run[index]])
                index += 1
            if aligned and reach == end and index - first > 1:
                self.cache.observe(token, run[first:index])

    def _map_text(self, draft: _Draft, start: int, stop: int, *, ended: bool) -> bool:
        """Maps the text tokens from `start` to `stop`; whether all of them are mapped. `ended`: no text follows."""
        if not self._texts:
            return self._map_runs(draft, start, stop, ended)
        data = self.drafter.text(draft.tokens[start:stop])
        if not data.startswith(draft.held):
            return False
        spelled = self.target.spell(data[len(draft.held) :])
        if spelled is None:
            return self._map_runs(draft, start, stop, ended)
        sizes = [len(self.drafter.pieces[token]) for token in draft.tokens[start:stop]]
        whole = len(data) if ended else whole_characters(data)[1]
        before = len(draft.found)
        self._map_spelled(draft, start, sizes, spelled, whole)
        if ended or len(draft.found) == before:
            return ended
        last = draft.found[-1]
        if last.way is not Way.DIRECT and self.target.grows(last.token):
            draft.found.pop()
        return False  # of a draft that goes on nothing follows

    def _map_spelled(self, draft: _Draft, start: int, sizes: list[int], spelled: list[int], whole: int) -> None:
        """Takes `spelled`, the target's tokens for the text after what is held.

        `sizes` are the bytes of the drafter's tokens from `start`. What ends after `whole` bytes of the text is taken
        as long as it maps directly.
        """
        pieces, index = self.target.pieces, 0  # of drafter tokens touched, from `start`
        end, reach = len(draft.held), 0  # bytes of target tokens, of drafter tokens
        while reach < end:
            reach += sizes[index]
            index += 1
        draft.held = b""
        for token in spelled:
            first, aligned = index, reach == end
            end += len(pieces[token])
            while reach < end:
                reach += sizes[index]
                index += 1
            way = Way.TEXT
            if aligned and reach == end:
                if index - first == 1:
                    way = Way.DIRECT
                elif self._ngrams and self.cache.get(draft.tokens[start + first : start + index]) == token:
                    way = Way.NGRAM
            if end > whole and way is not Way.DIRECT:
                return
            draft.take(token, start + index, way)

    def _map_runs(self, draft: _Draft, start: int, stop: int, ended: bool) -> bool:
        """As `_map_text`, without the tokenizer: the longest run that the cache knows, else a token that maps directly.

        What is held must end where a drafter token does.
        """
        pieces, at = self.drafter.pieces, start
        while draft.held and at < stop and draft.held.startswith(pieces[draft.tokens[at]]):
            draft.held = draft.held[len(pieces[draft.tokens[at]]) :]
            at += 1
        while at < stop and not draft.held:
            found = self._known_run(draft.tokens, at) if self._ngrams else None
            if found:
                token, length = found
                if at + length == stop and not ended and self.target.grows(token):
                    return False
                draft.take(token, at + length, Way.NGRAM)
            else:
                token, length = self.direct[draft.tokens[at]], 1
                if token < 0:
                    return False
                draft.take(token, at + 1, Way.DIRECT)
            at += length
        return not draft.held

    def _known_run(self, tokens: Sequence[int], start: int) -> tuple[int, int] | None:
        """What the cache knows of a run, if it is true: a cache is a file, and a file can be wrong."""
        found, pieces = self.cache.longest(tokens, start), self.target.pieces
        if found and found[0] < len(pieces):
            token, length = found
            return found if pieces[token] == self.drafter.text(tokens[start : start + length]) else None
        return None


class _Draft:
    """What is being mapped, and what came of it."""

    __slots__ = ("_probabilities", "_touched", "found", "held", "tokens")

    def __init__(self, tokens: Sequence[int], probabilities: Sequence[float] | None, held: bytes) -> None:
        self.tokens = tokens
        self.held = held
        self.found: list[Mapped] = []
        self._probabilities = probabilities
        self._touched = 0

    def take(self, token: int, count: int, way: Way) -> None:
        """`token` is next, and ends in drafter token `count` - 1."""
        probability = 1.0
        if self._probabilities is not None:
            for index in range(self._touched, count):
                probability *= self._probabilities[index]
        self._touched = count
        self.found.append(Mapped(token, count, probability, way))


def _same_pieces(drafter: Speller, target: Speller) -> array[int]:
    """For each drafter token the target token for the same bytes, or -1."""
    tokens = target.tokens_by_piece()
    return array("i", [tokens.get(piece, -1) for piece in drafter.pieces])


def _same_controls(drafter: Vocab, target: Vocab) -> dict[int, int]:
    """Target's control token: the drafter's of the same text."""
    named = {drafter.special_bytes(token): token for token in _controls(drafter)}
    pairs = ((token, named.get(target.special_bytes(token))) for token in _controls(target))
    return {token: found for token, found in pairs if found is not None}


def _controls(vocab: Vocab) -> list[int]:
    return [token for token, kind in enumerate(vocab.kinds) if kind is TokenKind.CONTROL]
