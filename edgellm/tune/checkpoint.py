"""The folder in which a run keeps what it needs to go on after a crash."""

from __future__ import annotations

import fcntl
import io
import os
from pathlib import Path
from typing import Any

import torch

from edgellm.errors import ConfigError, StorageError
from edgellm.models.files import write_atomic

_CHECKPOINT, _LOCK = "checkpoint.pt", "lock"


class StateFolder:
    """One run's folder, private to the user (mode 0700), held by one process at a time."""

    def __init__(self, path: Path) -> None:
        """Makes the folder if need be, and waits for a process that holds it to end. Raises StorageError."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.chmod(0o700)
            self._lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            for left in path.glob(".writing-*"):  # by a crash
                left.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{path} cannot be used: {error.strerror or error}") from None

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None if nothing was. Raises ConfigError if that cannot be read."""
        path = self.path / _CHECKPOINT
        if not path.is_file():
            return None
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of several kinds, by what is broken
            raise ConfigError(f"the checkpoint in {self.path} cannot be read: {type(error).__name__}") from None
        if not isinstance(found, dict):
            raise ConfigError(f"the checkpoint in {self.path} is none")
        return found

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint, whole or not at all. Raises StorageError, with the old one still there."""
        data = io.BytesIO()
        torch.save(state, data)
        try:
            write_atomic(self.path / _CHECKPOINT, data.getvalue())
        except OSError as error:
            raise StorageError(f"the checkpoint cannot be written: {error.strerror or error}") from None

    def adapter_path(self, step: int) -> Path:
        """Where the adapter of a step belongs."""
        return self.path / f"adapter-{step}.gguf"

    def close(self) -> None:
        """Lets the next process have it. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
