"""Tokens in, text out: incremental UTF-8 and stop strings across token borders."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable

from edgellm.errors import RequestError


class TextAssembler:
    """Turns the tokens of one answer into text that is safe to send at once.

    Held back are bytes of an unfinished character and text that may turn out to be the start of a stop string. All
    text returned by `feed` and `finish`, joined, equals `b"".join(pieces).decode("utf-8", "replace")`, cut before the
    stop string that is complete first (of two that end at the same character, the longer). How the text is split
    into tokens makes no difference.
    """

    __slots__ = (
        "_bytes",
        "_decoded",
        "_emitted",
        "_ends",
        "_first_chars",
        "_held",
        "_longest",
        "_piece",
        "_released_end",
        "_stop",
        "stop_string",
        "tokens_fed",
        "tokens_released",
    )

    def __init__(self, stop: tuple[str, ...], piece: Callable[[int], bytes]) -> None:
        """`piece` gives a token's bytes. Raises RequestError if a stop string is empty."""
        if not all(stop):
            raise RequestError("a stop string must not be empty", "stop")
        self._piece = piece
        self._stop = stop
        self._first_chars = tuple({text[0] for text in stop})
        self._longest = max(map(len, stop), default=0)
        self._bytes = b""  # the start of a character whose last byte has not come yet
        self._held = ""  # decoded, but possibly the start of a stop string
        self._decoded = 0  # characters
        self._emitted = 0  # characters
        self._ends: deque[int] = deque()  # for each token not yet released: where its text ends, in characters
        self._released_end = 0  # where the text of the last released token ends
        self.stop_string: str | None = None
        self.tokens_fed = 0
        self.tokens_released = 0
        """How many of the tokens fed have had their text emitted in full. After the end, tokens that gave nothing to
        the emitted text (those of a stop string) stay unreleased; a token that a stop string cuts counts as released.
        """

    @property
    def stopped(self) -> bool:
        """A stop string has come; nothing more will be emitted."""
        return self.stop_string is not None

    def feed(self, token: int) -> str:
        """The text that this token makes safe to send: often its own, sometimes none, sometimes more."""
        if self.stop_string is not None:
            return ""
        data = self._piece(token)
        if self._bytes:
            data = self._bytes + data
        try:
            text = data.decode()
            self._bytes = b""
        except UnicodeDecodeError:
            text, used = codecs.utf_8_decode(data, "replace", False)
            self._bytes = data[used:]
        self.tokens_fed += 1
        if not self._stop and not self._bytes and not self._ends:  # the common case, kept short
            self._decoded += len(text)
            self._emitted = self._released_end = self._decoded
            self.tokens_released = self.tokens_fed
            return text
        self._decoded += len(text)
        # A token that ends inside a character ends, for the reader, with that character.
        self._ends.append(self._decoded + (1 if self._bytes else 0))
        return self._emit(text)

    def finish(self) -> str:
        """The rest of the text, when no token will follow. An unfinished character becomes U+FFFD."""
        if self.stop_string is not None:
            return ""
        text = self._bytes.decode("utf-8", "replace")
        self._bytes = b""
        self._decoded += len(text)
        out = self._emit(text)
        if self.stop_string is None:
            out += self._held
            self._held = ""
            self._emitted = self._decoded
            self._ends.clear()
            self.tokens_released = self.tokens_fed
        return out

    def _emit(self, text: str) -> str:
        text = self._held + text
        cut = self._find_stop(text) if self._stop else -1
        if cut >= 0:
            self._held = ""
            self._emitted += cut
            self._release_cut()
            return text[:cut]
        keep = self._possible_stop(text) if self._stop else len(text)
        self._held = text[keep:]
        self._emitted += keep
        while self._ends and self._ends[0] <= self._emitted:
            self._released_end = self._ends.popleft()
            self.tokens_released += 1
        return text[:keep]

    def _find_stop(self, text: str) -> int:
        """Where the first complete stop string starts, or -1."""
        best: tuple[int, int] | None = None
        for stop in self._stop:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
                self.stop_string = stop
        return -1 if best is None else best[1]

    def _possible_stop(self, text: str) -> int:
        """Where the longest suffix that a stop string may begin with starts, or the text's length."""
        keep = len(text)
        for char in self._first_chars:
            start = text.find(char, max(0, len(text) - self._longest + 1))
            while 0 <= start < keep:
                tail = text[start:]
                if any(stop.startswith(tail) for stop in self._stop):
                    keep = start
                    break
                start = text.find(char, start + 1)
        return keep

    def _release_cut(self) -> None:
        """Release the tokens that gave some of the emitted text, the one that the stop string cuts included."""
        start = self._released_end
        while self._ends and (self._ends[0] <= self._emitted or start < self._emitted):
            start = self._ends.popleft()
            self.tokens_released += 1
