"""Target tokens that a drafter spells with several: the online n-gram cache of OmniDraft (arXiv 2507.02659, 3.1).

It is filled while serving, with what the target wrote. All targets of one vocabulary share the cache of a drafter.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import sys
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from edgellm.backend.vocab import TokenKind, Vocab
from edgellm.models.files import write_atomic

CAPACITY = 1 << 15
"""Entries, of some 400 bytes each."""
LONGEST_RUN = 64
"""Drafter tokens; a run of more is not kept."""

_log = logging.getLogger(__name__)
_MAGIC = b"edgellm ngram 1\n"
_HEAD = struct.Struct("<16s32s32sI")  # what it is, fingerprints of the drafter and of the target, entries
_MOST_USES = (1 << 32) - 1

Run = tuple[int, ...]


def vocabulary_fingerprint(vocab: Vocab) -> bytes:
    """SHA-256 over what a vocabulary's tokens stand for: equal for all models of a family.

    Unused tokens at the end, with which models of one family are padded to different sizes, do not count.
    """
    digest, unused = hashlib.sha256(), b""
    for token, (piece, kind) in enumerate(zip(vocab.pieces, vocab.kinds, strict=True)):
        if kind is TokenKind.UNUSED:
            unused += b"\0\0\0\0"
            continue
        text = b"\1" + vocab.special_bytes(token) if kind is TokenKind.CONTROL else b"\0" + piece
        digest.update(b"%s%s%s" % (unused, len(text).to_bytes(4, "little"), text))
        unused = b""
    return digest.digest()


class NgramCache:
    """Runs of drafter tokens, and the target token that each stands for. For one thread at a time.

    When it is full, the entry that was observed least often goes, of these the one not observed for longest. All
    operations but `save` and `load` take constant time.
    """

    def __init__(self, drafter: bytes = bytes(32), target: bytes = bytes(32), *, capacity: int = CAPACITY) -> None:
        """`drafter` and `target` are fingerprints of the vocabularies, for `save`. Raises ValueError."""
        if capacity < 1 or len(drafter) != 32 or len(target) != 32:
            raise ValueError("a cache needs room for an entry and fingerprints of 32 bytes")
        self.drafter, self.target, self.capacity = drafter, target, capacity
        self._entries: dict[Run, tuple[int, int]] = {}  # run: target token, how often it was observed
        self._levels: dict[int, OrderedDict[Run, None]] = {}  # by how often: runs, the least recent first
        self._least = 1  # the lowest level
        self._lengths: dict[int, dict[int, int]] = {}  # first token of a run: how many runs of each length there are

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forgets every run."""
        self._entries, self._levels, self._lengths, self._least = {}, {}, {}, 1

    def longest(self, run: Sequence[int], start: int = 0) -> tuple[int, int] | None:
        """The target token for the longest known run at `run[start:]`, and how many drafter tokens it takes."""
        lengths = self._lengths.get(run[start])
        if lengths is None:
            return None
        left = len(run) - start
        for length in sorted(lengths, reverse=True):
            if length <= left and (found := self._entries.get(tuple(run[start : start + length]))):
                return found[0], length
        return None

    def get(self, run: Sequence[int]) -> int:
        """The target token for exactly this run; -1 if it is not known."""
        found = self._entries.get(tuple(run))
        return found[0] if found else -1

    def observe(self, target: int, run: Sequence[int]) -> None:
        """The target wrote `target`, which `run` spells: 2 to LONGEST_RUN drafter tokens, else it is not kept.

        If `run` stood for another token, it stands for this one from now on, and is counted anew.
        """
        if not 2 <= len(run) <= LONGEST_RUN:
            return
        key = tuple(run)
        token, uses = self._entries.get(key, (target, 0))
        if uses:
            self._leave(key, uses)
        elif len(self._entries) >= self.capacity:
            self._evict()
        self._enter(key, target, min(uses + 1, _MOST_USES) if token == target else 1)

    def _enter(self, run: Run, target: int, uses: int) -> None:
        """Files an entry that is in no level as the most recent of its own."""
        if run not in self._entries:
            lengths = self._lengths.setdefault(run[0], {})
            lengths[len(run)] = lengths.get(len(run), 0) + 1
        if uses < self._least or self._least not in self._levels:
            self._least = uses
        self._entries[run] = (target, uses)
        self._levels.setdefault(uses, OrderedDict())[run] = None

    def _leave(self, run: Run, uses: int) -> None:
        level = self._levels[uses]
        del level[run]
        if not level:
            del self._levels[uses]

    def _evict(self) -> None:
        level = self._levels[self._least]
        run, _ = level.popitem(last=False)
        if not level:
            del self._levels[self._least]
        del self._entries[run]
        lengths = self._lengths[run[0]]
        lengths[len(run)] -= 1
        if not lengths[len(run)]:
            del lengths[len(run)]
            if not lengths:
                del self._lengths[run[0]]

    def save(self, path: Path) -> None:
        """Writes `path` in one step. A cache that cannot be written is logged: it is a help, not a need."""
        flat = array("I")
        for uses in sorted(self._levels):
            for run in self._levels[uses]:
                flat.extend((self._entries[run][0], uses, len(run), *run))
        if sys.byteorder == "big":
            flat.byteswap()
        head = _HEAD.pack(_MAGIC, self.drafter, self.target, len(self._entries))
        try:
            write_atomic(path, head + zlib.compress(flat.tobytes(), 1))
        except OSError as error:
            _log.warning("the n-gram cache %s cannot be written: %s", path, error)

    @classmethod
    def load(cls, path: Path, drafter: bytes, target: bytes, *, capacity: int = CAPACITY) -> Self:
        """The cache in `path`, the most used entries if there are more than `capacity`.

        Empty if there is no file, or it is damaged or for other vocabularies, which is logged.
        """
        try:
            raw = path.read_bytes()
            entries = _unpack(raw, drafter, target)
            cache = cls(drafter, target, capacity=capacity)
            for token, uses, run in entries[-capacity:]:
                if run in cache._entries:
                    raise ValueError("a run is there twice")
                cache._enter(run, token, uses)
        except FileNotFoundError:
            return cls(drafter, target, capacity=capacity)
        except (OSError, ValueError, zlib.error) as error:
            _log.warning("the n-gram cache %s cannot be used, and is begun anew: %s", path, error)
            return cls(drafter, target, capacity=capacity)
        return cache


def _unpack(raw: bytes, drafter: bytes, target: bytes) -> list[tuple[int, int, Run]]:
    """(target token, uses, run) of a file, the least used first. Raises ValueError and zlib.error."""
    if len(raw) < _HEAD.size or not raw.startswith(_MAGIC):
        raise ValueError("it is no n-gram cache of this version")
    _, its_drafter, its_target, count = _HEAD.unpack_from(raw)
    if (its_drafter, its_target) != (drafter, target):
        raise ValueError("it belongs to other vocabularies")
    most = 4 * count * (3 + LONGEST_RUN)
    unpacking = zlib.decompressobj()
    body = unpacking.decompress(raw[_HEAD.size :], most + 1)
    if not unpacking.eof or len(body) % 4 or len(body) > most:  # zlib has compared its checksum at its end
        raise ValueError("it is damaged")
    flat = array("I", body)
    if sys.byteorder == "big":
        flat.byteswap()
    entries, at, before = [], 0, 1
    while at < len(flat):
        token, uses, length = flat[at : at + 3] if at + 3 <= len(flat) else (0, 0, 0)
        run = tuple(flat[at + 3 : at + 3 + length])
        if not 2 <= length <= LONGEST_RUN or len(run) != length or uses < before:
            raise ValueError("it is damaged")
        entries.append((token, uses, run))
        at, before = at + 3 + length, uses
    if len(entries) != count:
        raise ValueError("it is damaged")
    return entries
