"""Uploaded files and result files: their content below the state directory, by SHA-256, and who they are in SQLite.

A file is written to a temporary, flushed, renamed and then entered, so one that is listed is whole. Content without an
entry and temporaries of writers that have died are what a crash can leave; `sweep` removes them. Equal content is kept
once. All is private to the user (modes 0700 and 0600): training data is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Self

from edgellm.errors import FileTooLargeError, StorageError, StoredFileNotFoundError
from edgellm.models.files import publish
from edgellm.tune.database import Database
from edgellm.tune.pages import Order, Page, new_id, read_page

Purpose = Literal["fine-tune", "fine-tune-results"]
_FOLDER = "files"
_TEMPORARY = ".writing-"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file. Its content never changes."""

    id: str
    sha256: str
    bytes: int
    created_at: int  # Unix seconds
    filename: str
    purpose: Purpose


class FileStore:
    """The files of one state directory. Any thread may call it; several processes may have one each."""

    def __init__(self, database: Database, now: Callable[[], float] = time.time) -> None:
        """`now` gives Unix seconds. Raises StorageError."""
        self._database = database
        self._now = now
        self._folder = database.home / _FOLDER
        with _told("be opened"):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._folder.chmod(0o700)

    def writer(self, limit_bytes: int) -> FileWriter:
        """Begin a file of at most `limit_bytes`. Raises StorageError."""
        return FileWriter(self._folder, limit_bytes)

    def keep(self, writer: FileWriter, filename: str, purpose: Purpose, file_id: str | None = None) -> StoredFile:
        """Finish what was written, and enter it, in place of the file that has `file_id`. Raises StorageError."""
        digest = writer.finish()
        file = StoredFile(file_id or new_id("file-"), digest, writer.bytes, int(self._now()), filename, purpose)
        with self._database.transaction() as connection:  # within it, nobody removes content of the same digest
            with _told("be written"):
                publish(writer.path, self._folder / digest)
            connection.execute(
                "INSERT OR REPLACE INTO files (id, sha256, bytes, created_at, filename, purpose) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (file.id, digest, file.bytes, file.created_at, filename, purpose),
            )
        return file

    def add(self, data: bytes, filename: str, purpose: Purpose, file_id: str | None = None) -> StoredFile:
        """Keep `data`; with a `file_id` of the caller's, doing it again changes nothing. Raises StorageError."""
        with self.writer(len(data)) as writer:
            writer.write(data)
            return self.keep(writer, filename, purpose, file_id)

    def get(self, file_id: str) -> StoredFile:
        """Raises StoredFileNotFoundError."""
        with self._database.reading() as connection:
            return _read(connection, file_id)

    def list(
        self, after: str | None = None, limit: int = 10_000, order: Order = "desc", purpose: str | None = None
    ) -> Page[StoredFile]:
        """Newest (desc) or oldest (asc) first. Raises RequestError if there is no file `after`."""
        where = {} if purpose is None else {"purpose": purpose}
        with self._database.reading() as connection:
            return read_page(connection, "files", _file, where=where, after=after, limit=limit, order=order)

    def path(self, file_id: str) -> Path:
        """Where the content lies. Raises StoredFileNotFoundError."""
        path = self._folder / self.get(file_id).sha256
        if not path.is_file():
            raise StoredFileNotFoundError(f"The content of the file '{file_id}' is gone from the disk")
        return path

    def open(self, file_id: str) -> BinaryIO:
        """The content, readable to its end even if the file is deleted meanwhile. Raises StoredFileNotFoundError."""
        path = self.path(file_id)
        try:
            return path.open("rb")
        except OSError as error:
            raise StoredFileNotFoundError(
                f"The content of the file '{file_id}' cannot be read: {error.strerror}"
            ) from None

    def delete(self, file_id: str) -> None:
        """Raises StoredFileNotFoundError."""
        with self._database.transaction() as connection:
            file = _read(connection, file_id)
            connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        # Only now that this can no longer be undone; and again under the lock, for the same content may have come.
        with self._database.transaction() as connection, _told("be removed"):
            if connection.execute("SELECT 1 FROM files WHERE sha256 = ?", (file.sha256,)).fetchone() is None:
                (self._folder / file.sha256).unlink(missing_ok=True)

    def sweep(self) -> int:
        """Remove what crashes have left; how many files that were. Raises StorageError."""
        removed = 0
        with self._database.transaction() as connection, _told("be swept"):
            known = {row["sha256"] for row in connection.execute("SELECT sha256 FROM files")}
            for path in self._folder.iterdir():
                dead = _is_dead(path) if path.name.startswith(_TEMPORARY) else path.name not in known
                if dead:
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed


class FileWriter:
    """A file on its way in: written, then kept or, when the block ends without that, removed."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.bytes = 0
        self._limit_bytes = limit_bytes
        self._digest = hashlib.sha256()
        with _told("be written"):
            self.path, self._file = _locked_temporary(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what is still buffered finds no room
            self._file.close()
        self.path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Raises FileTooLargeError when there is more than the limit, StorageError."""
        self.bytes += len(data)
        if self.bytes > self._limit_bytes:
            raise FileTooLargeError(f"The file is larger than this server takes ({self._limit_bytes} bytes)", "file")
        self._digest.update(data)
        with _told("be written"):
            self._file.write(data)

    def finish(self) -> str:
        """All is on the disk; the SHA-256 in hexadecimal. The lock stays until the block ends."""
        with _told("be written"):
            self._file.flush()
            os.fsync(self._file.fileno())  # here, where nobody waits for the database
        return self._digest.hexdigest()


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"Files cannot {what}: {error.strerror or error}") from None


def _locked_temporary(folder: Path) -> tuple[Path, BinaryIO]:
    """A new file of mode 0600, under the lock by which `sweep` knows that its writer lives."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=folder)
        file = os.fdopen(descriptor, "wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(name):
            return Path(name), file
        file.close()  # swept before it was locked


def _is_dead(path: Path) -> bool:
    """Whether nobody holds the lock of this temporary."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _read(connection: sqlite3.Connection, file_id: str) -> StoredFile:
    row = connection.execute("SELECT * FROM files WHERE id = ?", (file_id,)).fetchone()
    if row is None:
        raise StoredFileNotFoundError(f"No such File object: {file_id[:100]}")
    return _file(row)


def _file(row: sqlite3.Row) -> StoredFile:
    return StoredFile(row["id"], row["sha256"], row["bytes"], row["created_at"], row["filename"], row["purpose"])
