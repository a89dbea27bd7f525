"""What llama.cpp loads of a paged model: a copy of its files with holes where the experts are.

llama.cpp reads every tensor of a file. So that it never reads the experts, it is given a sparse copy: the same header
and offsets, the dense tensors, and nothing on the disk in between. Copies lie in the state directory, are made once for
each model, and made anew when the model's file changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgellm.errors import ModelLoadError
from edgellm.models.describe import STACKED_EXPERTS
from edgellm.models.gguf import GGUFHeader, read_header
from edgellm.models.split import split_headers

PROFILE_NAME = "routing.npy"

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 8 << 20
_SPARE_BYTES = 64 << 20  # of disk that is left free


def skeleton_of(path: Path, home: Path) -> Path:
    """The (first) file of the copy of the model at `path`; made now, under `home`, if there is none yet.

    Raises ModelLoadError if it cannot be made: no room, or no sparse files there.
    """
    headers = split_headers(read_header(path))
    folder = home / "experts" / f"{path.stem}-{_fingerprint(headers)}"
    first = folder / headers[0].path.name
    if first.is_file():
        return first
    try:
        _make(headers, folder)
    except OSError as error:
        raise ModelLoadError(
            f"{path.name}: its dense part cannot be copied to {folder.parent}: {error.strerror or error}"
        ) from None
    return first


def profile_path(path: Path, home: Path) -> Path:
    """Where the routing profile of the model at `path` is kept."""
    headers = split_headers(read_header(path))
    return home / "experts" / f"{path.stem}-{_fingerprint(headers)}" / PROFILE_NAME


def skeleton_bytes(path: Path) -> int:
    """Disk that the copy of the model at `path` takes."""
    return sum(size for header in split_headers(read_header(path)) for _, size in _dense_ranges(header))


def _fingerprint(headers: tuple[GGUFHeader, ...]) -> str:
    """Changes when a file does: its place, size and time of change."""
    digest = hashlib.sha256()
    for header in headers:
        facts = header.path.resolve().stat()
        digest.update(f"{header.path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def _make(headers: tuple[GGUFHeader, ...], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(size for header in headers for _, size in _dense_ranges(header))
    if shutil.disk_usage(folder.parent).free < needed + _SPARE_BYTES:
        raise OSError(f"it needs {needed >> 20} MiB of disk")
    _log.info("%s: copying what is not experts (%d MiB), once", headers[0].path.name, needed >> 20)
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        for header in headers:
            _copy_dense(header, making / header.path.name)
        _remove_stale(headers[0].path, folder)
        with contextlib.suppress(OSError):  # another process was faster
            making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _copy_dense(header: GGUFHeader, target: Path) -> None:
    with header.path.open("rb") as source, target.open("wb") as copy:
        copy.truncate(header.file_bytes)
        total = 0
        for start, size in _dense_ranges(header):
            total += size
            _copy_range(source.fileno(), copy.fileno(), start, size)
        os.fsync(copy.fileno())
    taken = target.stat().st_blocks * 512
    if header.file_bytes > 2 * total + _SPARE_BYTES and taken > (header.file_bytes + total) // 2:
        raise OSError("this file system has no sparse files; let EDGELLM_HOME be on another one")


def _copy_range(source: int, copy: int, start: int, size: int) -> None:
    end = start + size
    while start < end:
        piece = min(_CHUNK_BYTES, end - start)
        data = os.pread(source, piece, start)
        if not data:
            raise OSError("the model's file ends before it should")
        os.pwrite(copy, data, start)
        start += len(data)


def _dense_ranges(header: GGUFHeader) -> Iterator[tuple[int, int]]:
    """(start, bytes) of the header and of every tensor that is not stacked experts."""
    yield 0, header.data_offset
    for tensor in header.tensors:
        if not STACKED_EXPERTS.fullmatch(tensor.name):
            yield header.data_offset + tensor.offset, tensor.n_bytes


def _remove_stale(path: Path, keep: Path) -> None:
    """Copies of earlier states of the file."""
    for folder in keep.parent.glob(f"{_escaped(path.stem)}-{'?' * 16}"):
        if folder != keep and (folder / path.name).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
