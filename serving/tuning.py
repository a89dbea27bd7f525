"""The server's side of fine-tuning: uploaded files and jobs, opened when they are first asked for."""

from __future__ import annotations

import threading
from pathlib import Path

from edgellm.tune.database import Database
from edgellm.tune.files import FileStore


class Tuning:
    """A server that nobody asks for files or jobs writes nothing to the state directory."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._database: Database | None = None
        self._files: FileStore | None = None

    def files(self) -> FileStore:
        """The uploaded files. What an earlier crash has left of others is removed. Raises StorageError."""
        with self._lock:
            if self._files is None:
                database = self._database or Database(self._home)
                self._database = database
                files = FileStore(database)
                files.sweep()
                self._files = files
            return self._files

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._database is not None:
                self._database.close()
            self._database = self._files = None
