"""What has come of adapting a drafter to a model so far, on disk: figures, and which answers have been learned from."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgellm.models.files import write_atomic
from edgellm.speculative.buffer import Record

_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Adapted:
    """Of one drafter and one model. Acceptance is that of the last adaptation, on answers held out."""

    seen: str = ""  # mark of the newest answer at that time
    taken: int = 0  # adapters that drafted better than before
    dropped: int = 0  # that did not
    failed: int = 0
    seconds: float = 0.0  # of all of them together
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0  # of any of them
    acceptance_without: float | None = None  # an adapter
    acceptance_before: float | None = None
    acceptance_after: float | None = None  # with the adapter in use from then on

    def tried(self, result: dict[str, Any], newest: Record) -> Adapted:
        """After an adaptation that came to an end, with the fields of its Result."""
        taken = bool(result["accepted"])
        before, after = result["acceptance_before"], result["acceptance_after"]
        return replace(
            self,
            seen=mark(newest),
            taken=self.taken + taken,
            dropped=self.dropped + (not taken),
            seconds=self.seconds + result["seconds"],
            cpu_seconds=self.cpu_seconds + result["cpu_seconds"],
            peak_rss_bytes=max(self.peak_rss_bytes, result["peak_rss_bytes"]),
            acceptance_without=result["acceptance_without"],
            acceptance_before=before,
            acceptance_after=after if taken else before,
        )

    def broken(self, newest: Record) -> Adapted:
        """After one that failed: these answers alone are no reason to try again."""
        return replace(self, seen=mark(newest), failed=self.failed + 1)

    def fresh(self, records: Sequence[Record]) -> int:
        """How many of `records`, the oldest first, have come since the last attempt."""
        for count, record in enumerate(reversed(records)):
            if mark(record) == self.seen:
                return count
        return len(records)


def mark(record: Record) -> str:
    """Tells an answer from others, and says nothing about its text."""
    tokens = (*record.prompt, *record.answer)
    return hashlib.sha256(struct.pack(f"<I{len(tokens)}I", len(record.prompt), *tokens)).hexdigest()[:32]


def read_adapted(path: Path) -> Adapted:
    """What stands there; nothing has been done where that is not sound."""
    try:
        data = json.loads(path.read_bytes())
        if data.pop("version") != _VERSION:
            return Adapted()
        found = Adapted(**data)
        counts = (found.taken, found.dropped, found.failed, found.seconds, found.cpu_seconds, found.peak_rss_bytes)
        if not isinstance(found.seen, str) or any(isinstance(n, bool) or not n >= 0 for n in counts):
            raise ValueError("no figures")
        return found
    except FileNotFoundError:
        return Adapted()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is not used: %s", path.name, error)
        return Adapted()


def write_adapted(path: Path, adapted: Adapted) -> None:
    """Atomic. Raises OSError."""
    write_atomic(path, json.dumps({"version": _VERSION, **asdict(adapted)}).encode())
