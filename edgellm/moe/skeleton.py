"""What llama.cpp loads of a paged model: a copy of its files with holes where the experts are.

llama.cpp reads every tensor of a file. So that it never reads the experts, it is given a sparse copy: the same header
and offsets, the dense tensors, and nothing on the disk in between; of an expert pack, the model that was packed. Copies
lie in the state directory, are made once for each model, and made anew when the model's file changes.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgellm.errors import ModelLoadError
from edgellm.models.gguf import GGUFHeader
from edgellm.models.gguf_write import NewTensor, write_header
from edgellm.models.packs import PACK_KEYS, PACK_TENSOR, STACKED_EXPERTS, is_pack, read_pack

PROFILE_NAME = "routing.npy"

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 8 << 20
_SPARE_BYTES = 64 << 20  # of disk that is left free
_MAKING = ".making-"
_ABANDONED_S = 24 * 3600.0  # a copy that is still being made after so long, nobody is making
_THERE = (errno.ENOTEMPTY, errno.EEXIST)  # what rename() says of a target that is not empty

Headers = tuple[GGUFHeader, ...]


def skeleton_of(headers: Headers, home: Path) -> Path:
    """The (first) file of the copy of the model that has these headers; made now, under `home`, if there is none yet.

    Raises ModelLoadError if it cannot be made: no room, or no sparse files there.
    """
    name = headers[0].path.name
    try:
        folder = _folder(headers, home)
        first = folder / name
        if first.is_file():
            return first
        _make(headers, folder)
    except OSError as error:
        _log.warning("%s: no copy of the dense part in %s: %s", name, home / "experts", error)
        raise ModelLoadError(f"{name}: its dense part cannot be copied: {error.strerror or error}") from None
    if not first.is_file():
        raise ModelLoadError(f"{name}: the copy of its dense part was removed while it was made")
    return first


def profile_path(headers: Headers, home: Path) -> Path:
    """Where the routing profile of the model that has these headers is kept. Raises OSError if its files are gone."""
    return _folder(headers, home) / PROFILE_NAME


def skeleton_bytes(headers: Headers) -> int:
    """Disk that the copy of the model takes."""
    return sum(size for header in headers for _, size in _dense_ranges(header))


def _folder(headers: Headers, home: Path) -> Path:
    """Named after the model, the files' places, and their state: sizes and times of change."""
    paths = [header.path.resolve() for header in headers]
    facts = [path.stat() for path in paths]
    place = _hash("\0".join(map(str, paths)))
    state = _hash("\0".join(f"{fact.st_size}\0{fact.st_mtime_ns}" for fact in facts))
    return home / "experts" / f"{headers[0].path.stem}-{place}-{state}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _make(headers: Headers, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    _remove_stale(folder)
    needed = skeleton_bytes(headers)
    if shutil.disk_usage(folder.parent).free < needed + _SPARE_BYTES:
        raise OSError(f"it needs {needed >> 20} MiB of disk")
    _log.info("%s: copying what is not experts (%d MiB), once", headers[0].path.name, needed >> 20)
    making = Path(tempfile.mkdtemp(prefix=_MAKING, dir=folder.parent))
    try:
        for header in headers:
            _copy_dense(header, making / header.path.name)
        if _folder(headers, folder.parent.parent) != folder:
            raise OSError("the model's file was changed while it was copied")
        _move(making, folder, [header.path.name for header in headers])
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _move(making: Path, folder: Path, names: list[str]) -> None:
    """The files `names` of `making` into `folder`, the first of them last: with it there, all are.

    Whoever else has made the same copy in the meantime has made the same files.
    """
    try:
        making.rename(folder)
    except OSError as error:
        if error.errno not in _THERE:
            raise
        if not (folder / names[0]).is_file():  # a profile or checksums were left of a copy
            for name in reversed(names):
                os.replace(making / name, folder / name)


def _copy_dense(header: GGUFHeader, target: Path) -> None:
    with header.path.open("rb") as source, target.open("wb") as copy:
        if os.fstat(source.fileno()).st_size != header.file_bytes:
            raise OSError("the model's file was changed while it was loaded")
        if is_pack(header):
            size = _copy_pack(header, source.fileno(), copy)
        else:
            size = header.file_bytes
            for start, length in _dense_ranges(header):
                _copy_range(source.fileno(), copy.fileno(), start, start, length)
        copy.truncate(size)
        os.fsync(copy.fileno())
    total, taken = skeleton_bytes((header,)), target.stat().st_blocks * 512
    if size > 2 * total + _SPARE_BYTES and taken > (size + total) // 2:
        raise OSError("this file system has no sparse files; let EDGELLM_HOME be on another one")


def _copy_pack(header: GGUFHeader, source: int, copy: BinaryIO) -> int:
    """A pack as the model that it was made of: the stacked tensors stand behind the dense ones. Its size in bytes."""
    dense = [tensor for tensor in header.tensors if not PACK_TENSOR.fullmatch(tensor.name)]
    tensors = [NewTensor(tensor.name, tensor.dims, tensor.type) for tensor in (*dense, *read_pack(header).stacked)]
    offsets = write_header(copy, header, tensors, drop=PACK_KEYS)
    copy.flush()
    for tensor, offset in zip(dense, offsets, strict=False):
        _copy_range(source, copy.fileno(), header.data_offset + tensor.offset, offset, tensor.n_bytes)
    return offsets[-1] + tensors[-1].n_bytes


def _copy_range(source: int, copy: int, start: int, target: int, size: int) -> None:
    end = start + size
    while start < end:
        piece = min(_CHUNK_BYTES, end - start)
        data = os.pread(source, piece, start)
        if not data:
            raise OSError("the model's file ends before it should")
        written = os.pwrite(copy, data, target)
        start, target = start + written, target + written


def _dense_ranges(header: GGUFHeader) -> Iterator[tuple[int, int]]:
    """(start, bytes) of the header and of every tensor that is not experts."""
    yield 0, header.data_offset
    for tensor in header.tensors:
        if not STACKED_EXPERTS.fullmatch(tensor.name) and not PACK_TENSOR.fullmatch(tensor.name):
            yield header.data_offset + tensor.offset, tensor.n_bytes


def _remove_stale(keep: Path) -> None:
    """Copies of earlier states of the same files."""
    model = keep.name.rpartition("-")[0]
    for folder in keep.parent.glob(f"{glob.escape(model)}-{'?' * 16}"):
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """What was left of copies when their makers were ended."""
    for folder in parent.glob(f"{_MAKING}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
