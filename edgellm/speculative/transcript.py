"""One answer's text as its drafter reads it: drafter tokens that follow what the target writes."""

from __future__ import annotations

from collections.abc import Sequence

from edgellm.speculative.bridge import Bridge
from edgellm.speculative.spelling import incomplete_bytes

_TAIL_BYTES = 96  # text without a place to cut is spelled anew from here back at most
_KEPT_BYTES = 48


class Transcript:
    """The text of target tokens in drafter tokens. For one thread at a time.

    Begins with the drafter's BOS if its tokenizer adds one; the target's own is left out. A control token becomes the
    drafter's of the same text, else that text, which is then nothing special. Text is spelled as the drafter's
    tokenizer does, but for drafted tokens that were accepted, and for bytes that the drafter's vocabulary lacks, which
    it does not get to see.
    """

    def __init__(self, bridge: Bridge, tokens: Sequence[int] = ()) -> None:
        """`tokens`: what the target has read or written so far."""
        self._bridge = bridge
        self._speller = bridge.drafter
        drafter = bridge.drafter.vocab
        self._tokens: list[int] = [drafter.bos] if drafter.adds_bos else []
        self._tail = len(self._tokens)  # tokens from here on may be spelled anew
        self._tail_text = b""
        self._held = b""
        self._same = 0
        self._begun = False
        self.extend(tokens)

    @property
    def tokens(self) -> Sequence[int]:
        """Drafter tokens for everything so far but `held`. It changes with `extend`."""
        return self._tokens

    @property
    def held(self) -> bytes:
        """The bytes at the end that begin a character; at most 3."""
        return self._held

    def extend(self, target_tokens: Sequence[int], drafted: Sequence[int] = ()) -> int:
        """Appends `target_tokens`; how many drafter tokens are still the same.

        `drafted` are the drafter tokens drafted after `tokens`, if any: as many of them stay as spell what was
        appended, but for the last word, which may be spelled anew with what follows. Tokens are compared with the
        transcript so far with `drafted` behind it, as it is in the drafter's KV cache.
        """
        self._same = len(self._tokens)
        waiting, text, self._held = drafted, self._held, b""
        pieces, target = self._bridge.target.pieces, self._bridge.target.vocab
        if not self._begun and target_tokens:
            self._begun = True
            if target.adds_bos and target_tokens[0] == target.bos:
                target_tokens = target_tokens[1:]
        for token in target_tokens:
            piece = pieces[token]
            if not piece:
                control = self._bridge.control_to_drafter(token)
                piece = target.special_bytes(token)
                if control >= 0:
                    waiting = self._append(text, waiting, ended=True)
                    if waiting and waiting[0] == control and self._same == len(self._tokens):
                        self._same += 1
                        waiting = waiting[1:]
                    else:
                        waiting = ()
                    self._tokens.append(control)
                    self._tail, self._tail_text, text = len(self._tokens), b"", b""
                    continue
            text += piece
        self._append(text, waiting, ended=False)
        return self._same

    def _append(self, text: bytes, drafted: Sequence[int], *, ended: bool) -> Sequence[int]:
        """Spells `text`, its first part with `drafted`; what is left of them if all of it was spelled so, else none."""
        pieces, tokens = self._speller.pieces, self._tokens
        count = at = 0
        for token in drafted:
            piece = pieces[token]
            if not piece or not text.startswith(piece, at):
                break
            at += len(piece)
            count += 1
        if count:
            tokens += drafted[:count]
            self._same += count
            self._tail_text += text[:at]
            self._move_tail()
        if at == len(text):
            return drafted[count:]
        self._spell_tail(self._tail_text + text[at:], ended)
        self._move_tail()
        return ()

    def _spell_tail(self, text: bytes, ended: bool) -> None:
        cut = 0 if ended else incomplete_bytes(text)
        if cut:
            text, self._held = text[:-cut], text[-cut:]
        tokens, tail = self._tokens, self._tail
        if len(text) == len(self._tail_text):
            return
        spelled = self._speller.spell_most(text)
        same, most = 0, min(len(spelled), len(tokens) - tail)
        while same < most and spelled[same] == tokens[tail + same]:
            same += 1
        self._same = min(self._same, tail + same)
        tokens[tail + same :] = spelled[same:]
        self._tail_text = text if self._speller.spells_all else self._speller.text(spelled)

    def _move_tail(self) -> None:
        """Leaves behind what is settled: up to the last place to cut, or what makes the tail too long."""
        text = self._tail_text
        place = self._speller.last_boundary(text)
        if len(text) - place > _TAIL_BYTES:
            place = len(text) - _KEPT_BYTES
        if not place:
            return
        pieces, tokens = self._speller.pieces, self._tokens
        tail, at = self._tail, 0
        while at < place and tail < len(tokens):
            at += len(pieces[tokens[tail]])
            tail += 1
        self._tail, self._tail_text = tail, text[at:]
