"""One file over HTTP, resumable: range requests into a partial file, checked in full before it gets its name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from edgellm.errors import InvalidModelFileError, PullError
from edgellm.models.files import sha256_file
from edgellm.models.gguf import read_header

if TYPE_CHECKING:
    import httpx

SPARE_DISK_BYTES = 64 << 20  # left free on the disk
MAX_TRIES = 5  # in a row without a single new byte
RETRY_WAIT_S = 0.5  # doubled at each try
_TIMEOUT_S = 30.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RETRIABLE = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Transfer:
    """A file to fetch: from `url` to `path`, `file_bytes` long, with the announced hash if there is one."""

    url: str
    path: Path
    partial_folder: Path
    file_bytes: int
    sha256: str | None
    git_blob: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def partial(self) -> Path:
        """Named by content, so that only the same bytes are ever continued. A digest is checked before it is a name."""
        known = self.sha256 is not None and _SHA256.fullmatch(self.sha256)
        key = self.sha256 if known else hashlib.sha256(self.url.encode()).hexdigest()
        return self.partial_folder / f"{key}.part"

    def arrived_bytes(self) -> int:
        """What an earlier try left, in bytes."""
        if self.path.is_file() and self.path.stat().st_size == self.file_bytes:
            return self.file_bytes
        return self.partial_bytes()

    def partial_bytes(self) -> int:
        n_bytes = self.partial.stat().st_size if self.partial.is_file() else 0
        return n_bytes if n_bytes <= self.file_bytes else 0


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raises PullError if `folder`'s disk has no room for `needed_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed_bytes + SPARE_DISK_BYTES > free and needed_bytes > 0:
        raise PullError(
            f"Not enough room on the disk of {folder}: {needed_bytes / 1e6:.0f} MB to fetch, {free / 1e6:.0f} MB free"
        )


def fetch(transfer: Transfer, report: Callable[[int], None]) -> Path:
    """Fetch the file and check it; the complete temporary file, or `transfer.path` if that is already right.

    `report` is told how many more bytes are there. Raises PullError.
    """
    if transfer.path.is_file():
        if _is_right(transfer, transfer.path):
            return transfer.path
        report(transfer.partial_bytes() - transfer.arrived_bytes())
    transfer.partial_folder.mkdir(parents=True, exist_ok=True)
    # Unbuffered: where the disk is full, nothing waits in a buffer to fail once more on closing.
    with transfer.partial.open("ab", buffering=0) as file, _locked(file, transfer):
        if file.tell() > transfer.file_bytes:
            _restart(file)
        try:
            _download(transfer, file, report)
        except OSError as error:
            _full(transfer, error)
        _check(transfer)
    return transfer.partial


@contextlib.contextmanager
def _locked(file: FileIO, transfer: Transfer) -> Iterator[None]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise PullError(f"{transfer.path.name} is being pulled by another process") from None
    yield


def _full(transfer: Transfer, error: OSError) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise PullError("The disk is full; make room and pull again: what has arrived is kept") from None
    raise PullError(f"{transfer.path.name} cannot be written: {error.strerror or error}") from None


def _download(transfer: Transfer, file: FileIO, report: Callable[[int], None]) -> None:
    """Append to `file` until it has all bytes. Tries again as long as bytes keep coming."""
    import httpx

    tries = 0
    headers = {"Accept-Encoding": "identity", "User-Agent": "edgellm"}
    if transfer.token:
        headers["Authorization"] = f"Bearer {transfer.token}"  # httpx drops it when redirected to another host
    with httpx.Client(follow_redirects=True, timeout=_TIMEOUT_S, headers=headers) as client:
        while (start := file.tell()) < transfer.file_bytes:
            try:
                _continue(client, transfer, file, report)
                reason = "the connection was closed early"
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            except _AgainError as error:
                reason = str(error)
            tries = 0 if file.tell() > start else tries + 1
            if tries >= MAX_TRIES:
                raise PullError(f"{transfer.path.name} stopped at {start} of {transfer.file_bytes} bytes: {reason}")
            if file.tell() < transfer.file_bytes:
                time.sleep(RETRY_WAIT_S * 2**tries)


class _AgainError(Exception):
    """The server could not answer now."""


def _continue(client: httpx.Client, transfer: Transfer, file: FileIO, report: Callable[[int], None]) -> None:
    start = file.tell()
    with client.stream("GET", transfer.url, headers={"Range": f"bytes={start}-"} if start else {}) as response:
        if response.status_code == 416 or (start and response.status_code == 200):
            # The server cannot continue: all over again. The next round asks without a range.
            _restart(file)
            report(-start)
            if response.status_code == 416:
                raise _AgainError("the server refuses to continue the file")
        elif response.status_code in _RETRIABLE:
            raise _AgainError(f"the server answered {response.status_code}")
        elif response.status_code not in (200, 206):
            _refused(transfer, response.status_code)
        elif start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise PullError(f"{transfer.path.name}: the server sent another range than asked for")
        for piece in response.iter_raw():
            if file.tell() + len(piece) > transfer.file_bytes:
                transfer.partial.unlink()
                raise PullError(f"{transfer.path.name} is longer than announced; it was removed")
            _write_all(file, piece)
            report(len(piece))


def _write_all(file: FileIO, piece: bytes) -> None:
    left = memoryview(piece)
    while left:
        left = left[file.write(left) :]


def _restart(file: FileIO) -> None:
    file.truncate(0)
    file.seek(0)


def _refused(transfer: Transfer, status: int) -> NoReturn:
    hint = "; set HF_TOKEN to a token that may read it" if status in (401, 403) else ""
    raise PullError(f"{transfer.path.name}: the server answered {status}{hint}")


def _is_right(transfer: Transfer, path: Path) -> bool:
    if path.stat().st_size != transfer.file_bytes:
        return False
    if transfer.sha256 is not None:
        return sha256_file(path) == transfer.sha256
    return transfer.git_blob is None or _git_blob(path) == transfer.git_blob


def _git_blob(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    digest.update(path.read_bytes())  # only files too small for large-file storage come here
    return digest.hexdigest()


def _check(transfer: Transfer) -> None:
    """Size, hash and GGUF header of the complete partial file; a wrong one is removed."""
    try:
        if not _is_right(transfer, transfer.partial):
            raise PullError(f"{transfer.path.name} does not have the announced hash; it was removed, pull again")
        read_header(transfer.partial)
    except (PullError, InvalidModelFileError) as error:
        transfer.partial.unlink(missing_ok=True)
        if isinstance(error, PullError):
            raise
        raise PullError(f"{transfer.path.name} is not a sound GGUF file and was removed: {error}") from None
