"""The SHA-256 of model files, each read once as long as it does not change."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from edgellm.models.files import sha256_file
from edgellm.models.split import split_paths

_State = tuple[tuple[str, int, int], ...]


class ModelHashes:
    """Remembers by path, size and time of change. Any thread may ask."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[_State, str]] = {}
        self._lock = threading.Lock()

    def sha256(self, path: Path) -> str:
        """Of a model's file; of a split model, of its parts' hashes in order. Raises OSError."""
        with self._lock:
            parts = split_paths(path)
            state = _state(parts)
            known = self._known.get(path)
            if known is not None and known[0] == state:
                return known[1]
            hashes = [sha256_file(part) for part in parts]
            found = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
            if _state(parts) == state:
                self._known[path] = (state, found)
            return found


def _state(parts: tuple[Path, ...]) -> _State:
    return tuple((str(part), status.st_size, status.st_mtime_ns) for part in parts for status in (part.stat(),))
