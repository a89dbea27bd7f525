"""Files written so that a crash at any moment leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def publish(temporary: Path, path: Path) -> None:
    """Flush `temporary` to the disk and give it the name `path`, in one step. Both on the same file system."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    _sync_directory(path.parent)


def write_atomic(path: Path, data: bytes, *, make_folders: bool = True) -> None:
    """Make `path` hold `data`, creating directories as needed, if they may be. Raises OSError."""
    with temporary_beside(path, make_folders=make_folders) as temporary:
        temporary.write_bytes(data)
        publish(temporary, path)


def copy_atomic(source: Path, path: Path, *, private: bool = False) -> None:
    """Make `path` a copy of `source`, for its owner alone if `private`. Raises OSError."""
    with temporary_beside(path) as temporary:
        if private:
            temporary.chmod(0o600)
        shutil.copyfile(source, temporary)
        publish(temporary, path)


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file in lower-case hexadecimal; `progress` is told the bytes of each piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
            if progress:
                progress(len(piece))
    return digest.hexdigest()


class temporary_beside(contextlib.AbstractContextManager[Path]):  # noqa: N801 (reads as a function)
    """A new hidden file beside `path`, for `publish`; removed on exit if it is still there. Raises OSError."""

    def __init__(self, path: Path, *, make_folders: bool = True) -> None:
        if make_folders:
            path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
        os.close(descriptor)
        self._path = Path(name)
        self._path.chmod(0o644)

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot flush a directory
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
