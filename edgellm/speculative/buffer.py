"""What a target wrote lately, kept on disk for adapting a drafter to it: bounded, private, token ids alone."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import sys
import threading
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 4 << 20
"""Of a buffer's file, if nothing else is asked for: about a million tokens."""

PROMPT_TOKENS = 256
"""Of a prompt, from its end: as many as a drafter reads."""

ANSWER_TOKENS = 4096
"""Of an answer, from its beginning."""
_KEPT_SHARE = 0.75  # of a full buffer: it is seldom written anew
_MAGIC = b"edgellm said 01\n"
_HEAD = struct.Struct("<16s32s")  # what it is, fingerprint of the target's vocabulary
_RECORD = struct.Struct("<III")  # tokens of the prompt, of the answer; CRC-32 of these two and of all tokens
_TOKEN_BYTES = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """An answer, and the end of the prompt that it was given to, in the target's tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class AnswerBuffer:
    """The records of one target model in a file, the oldest first. Any thread or process may use it.

    A record is written behind the others at once; when there is no room, the oldest go. What a crash has left of a
    record does not count, nor what follows a damaged one.
    """

    def __init__(
        self, path: Path, vocabulary: bytes, *, max_bytes: int = MAX_BYTES, prompt_tokens: int = PROMPT_TOKENS
    ) -> None:
        """`vocabulary` is the target's fingerprint (ngram_cache.py): records of another count for nothing. Nothing is
        read or written yet. Raises ValueError."""
        if len(vocabulary) != 32 or max_bytes < 1024 or prompt_tokens < 0:
            raise ValueError("a buffer needs a fingerprint of 32 bytes, and room for 1024")
        self.path, self.max_bytes, self.prompt_tokens = path, max_bytes, prompt_tokens
        self._head = _HEAD.pack(_MAGIC, vocabulary)
        self._lock = threading.Lock()
        self._sound: tuple[int, int] | None = None  # inode and size of the file when it was known to be sound

    def append(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Adds a record; an answer without tokens is none. Raises OSError, ValueError for what are no token ids.

        Takes some tenths of a millisecond as a rule, and what writing the file anew takes when it is full.
        """
        if not answer:
            return
        room = (self.max_bytes - len(self._head) - _RECORD.size) // _TOKEN_BYTES
        said = answer[: min(ANSWER_TOKENS, room)]
        most = min(self.prompt_tokens, room - len(said))
        data = _pack(prompt[len(prompt) - min(len(prompt), most) :], said)
        with self._lock, self._opened() as descriptor:
            size = self._repair(descriptor)
            if size + len(data) > self.max_bytes:
                self._renew(descriptor, data)
                return
            os.pwrite(descriptor, data, size)
            self._sound = (os.fstat(descriptor).st_ino, size + len(data))

    def read(self) -> list[Record]:
        """Every sound record, the oldest first; none if there is no file, or one for another vocabulary."""
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return []
        return [record for _, record in self._records(raw)]

    def clear(self) -> None:
        """Deletes the file. Raises OSError."""
        with self._lock:
            self._sound = None
            self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The file, made if need be, for this process alone until the end."""
        folder = self.path.parent
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if self._is_there(descriptor):
                    yield descriptor
                    return
            finally:
                os.close(descriptor)

    def _is_there(self, descriptor: int) -> bool:
        """Whether the file still has its name: another process may have renewed or deleted it meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        return False

    def _repair(self, descriptor: int) -> int:
        """Cuts off whatever is no sound record, and begins a file that is none; its size then."""
        state = os.fstat(descriptor)
        if self._sound == (state.st_ino, state.st_size):
            return state.st_size
        os.fchmod(descriptor, 0o600)
        raw = _read(descriptor, state.st_size)
        if not raw.startswith(self._head):
            if raw:
                _log.warning("%s is no buffer of this model, and is begun anew", self.path.name)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, self._head, 0)
            return len(self._head)
        end = max((end for end, _ in self._records(raw)), default=len(self._head))
        os.ftruncate(descriptor, end)
        return end

    def _renew(self, descriptor: int, data: bytes) -> None:
        """Writes the file anew: the latest records, as many as leave room for more, and `data`."""
        raw = _read(descriptor, os.fstat(descriptor).st_size)
        ends = [len(self._head), *(end for end, _ in self._records(raw))]
        room = int(_KEPT_SHARE * self.max_bytes) - len(self._head) - len(data)
        start = next((end for end in ends if ends[-1] - end <= room), ends[-1])
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            writing = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                whole = self._head + raw[start : ends[-1]] + data
                with os.fdopen(os.dup(writing), "wb") as file:
                    file.write(whole)
                os.fsync(writing)
                self._sound = (os.fstat(writing).st_ino, len(whole))
            finally:
                os.close(writing)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _records(self, raw: bytes) -> Iterator[tuple[int, Record]]:
        """Each sound record up to the first that is not, and where it ends."""
        if not raw.startswith(self._head):
            return
        at = len(self._head)
        while at + _RECORD.size <= len(raw):
            prompt, answer, check = _RECORD.unpack_from(raw, at)
            start = at + _RECORD.size
            end = start + _TOKEN_BYTES * (prompt + answer)
            if end > len(raw) or not answer or zlib.crc32(raw[at : at + 8] + raw[start:end]) != check:
                return
            tokens = _unpack(raw[start:end])
            yield end, Record(tokens[:prompt], tokens[prompt:])
            at = end


def _pack(prompt: Sequence[int], answer: Sequence[int]) -> bytes:
    try:
        tokens = array("I", [*prompt, *answer])
    except (OverflowError, TypeError):
        raise ValueError("tokens are whole numbers from 0") from None
    if sys.byteorder == "big":
        tokens.byteswap()
    head = struct.pack("<II", len(prompt), len(answer))
    body = tokens.tobytes()
    return head + struct.pack("<I", zlib.crc32(head + body)) + body


def _unpack(body: bytes) -> tuple[int, ...]:
    tokens = array("I", body)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tuple(tokens)


def _read(descriptor: int, size: int) -> bytes:
    pieces, at = [], 0
    while at < size and (piece := os.pread(descriptor, size - at, at)):
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)
