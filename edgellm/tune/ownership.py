"""Which process runs the jobs of a state directory: at most one, and none that has died."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from edgellm.errors import StorageError

LOCK = "tune.lock"


class Ownership:
    """A lock that the kernel takes back when its holder ends, however it ends.

    Who holds it may call `JobStore.recover`: whatever is running then has no process. A trainer must not inherit it.
    """

    def __init__(self, home: Path, lock: str = LOCK) -> None:
        self._path = home / lock
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Whether it is ours, now or already. Raises StorageError."""
        if self._descriptor is not None:
            return True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{self._path} cannot be opened: {error.strerror or error}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:
            os.close(descriptor)
            raise StorageError(f"{self._path} cannot be locked: {error.strerror or error}") from None
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
