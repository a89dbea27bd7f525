"""Writes expert packs: GGUF files in which all of an expert lies together (edgellm/models/packs.py)."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgellm.backend.narrow import narrow
from edgellm.errors import InvalidModelFileError, ModelUnsupportedError, PackError
from edgellm.models.files import publish, temporary_beside
from edgellm.models.ggml_types import GGML_TYPES
from edgellm.models.gguf import GGUFHeader, TensorInfo, read_header
from edgellm.models.gguf_write import NewTensor, Numbers, write_header
from edgellm.models.packs import (
    DIMS_KEY,
    NAMES_KEY,
    PACK_KEYS,
    RECORD_ALIGNMENT,
    STACKED_EXPERTS,
    TYPES_KEY,
    VERSION,
    VERSION_KEY,
    WIDTHS_KEY,
    block_of,
    is_pack,
)
from edgellm.models.split import split_headers
from edgellm.moe.records import Records, lay_out_records
from edgellm.moe.widths import Widths

Progress = Callable[[int, int], None]  # bytes written, of so many

_BYTES = next(kind for kind in GGML_TYPES.values() if kind.name == "I8")
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_CHUNK_BYTES = 8 << 20
_SPARE_BYTES = 64 << 20  # of disk that is left free

Place = tuple[GGUFHeader, TensorInfo]


def write_pack(
    path: Path,
    target: Path,
    *,
    widths: Widths | None = None,
    facts: Mapping[str, Numbers | str] | None = None,
    progress: Progress | None = None,
) -> int:
    """Writes the pack of the model whose (first) file is `path` to `target`, and returns its size in bytes.

    `widths`, (blocks, experts), are bits that experts are narrowed to, 0 for none; without them the pack has what the
    model has, to the last bit. `facts` are further keys. The file appears when it is whole. Raises PackError if
    `target` is there, or cannot be written; ModelUnsupportedError for a model without stacked experts; what
    `read_header` and `split_headers` raise.
    """
    headers = split_headers(read_header(path))
    blocks = _packable(headers)
    if widths is None:
        widths = _full_widths(blocks)
    records = _records(blocks, widths)
    with _written_to(target) as part:
        _check_room(target.parent, headers, records)
        with part.open("wb") as file:
            _write(file, headers, blocks, records, _keys(blocks, widths, facts), progress)
        publish(part, target)
    return target.stat().st_size


def check_packable(path: Path, target: Path) -> None:
    """Raises what `write_pack` would raise, as far as that can be known before: measuring widths takes long."""
    headers = split_headers(read_header(path))
    blocks = _packable(headers)
    with _written_to(target):
        _check_room(target.parent, headers, _records(blocks, _full_widths(blocks)))


@contextlib.contextmanager
def _written_to(target: Path) -> Iterator[Path]:
    """A temporary file that may become `target`. Raises PackError if there is one, and for an OSError."""
    if os.path.lexists(target):
        raise PackError(f"{target} is there already")
    try:
        with temporary_beside(target, make_folders=False) as part:
            yield part
    except OSError as error:
        raise PackError(f"{target} cannot be written: {error.strerror or error}") from None


def _full_widths(blocks: Mapping[int, list[Place]]) -> Widths:
    experts = next(iter(blocks.values()))[0][1].dims[2]
    return np.zeros((len(blocks), experts), np.uint8)


def _records(blocks: Mapping[int, list[Place]], widths: Widths) -> dict[int, Records]:
    return {
        block: lay_out_records([tensor for _, tensor in places], widths[row].tobytes())
        for row, (block, places) in enumerate(sorted(blocks.items()))
    }


def _packable(headers: tuple[GGUFHeader, ...]) -> dict[int, list[Place]]:
    """Block -> its stacked tensors. Raises ModelUnsupportedError."""
    name = headers[0].path.name
    if is_pack(headers[0]):
        raise ModelUnsupportedError(f"{name} is an expert pack already")
    blocks: dict[int, list[Place]] = {}
    for header in headers:
        for tensor in header.tensors:
            if STACKED_EXPERTS.fullmatch(tensor.name):
                blocks.setdefault(block_of(tensor), []).append((header, tensor))
    if not blocks:
        raise ModelUnsupportedError(f"{name} has no stacked expert tensors to be packed")
    if len({tensor.dims[2:] for places in blocks.values() for _, tensor in places}) != 1:
        raise ModelUnsupportedError(f"{name}: its layers have different numbers of experts")
    return blocks


def _keys(
    blocks: Mapping[int, list[Place]], widths: Widths, facts: Mapping[str, Numbers | str] | None
) -> dict[str, Numbers | tuple[str, ...] | str]:
    tensors = [tensor for _, places in sorted(blocks.items()) for _, tensor in places]
    return {
        VERSION_KEY: Numbers("uint32", VERSION),
        NAMES_KEY: tuple(tensor.name for tensor in tensors),
        TYPES_KEY: Numbers("uint32", tuple(tensor.type.code for tensor in tensors)),
        DIMS_KEY: Numbers("uint64", tuple(dim for tensor in tensors for dim in tensor.dims)),
        WIDTHS_KEY: Numbers("uint8", tuple(widths.ravel().tolist())),
        **(facts or {}),
    }


def _dense(headers: tuple[GGUFHeader, ...]) -> Iterator[Place]:
    for header in headers:
        for tensor in header.tensors:
            if not STACKED_EXPERTS.fullmatch(tensor.name):
                yield header, tensor


def _check_room(folder: Path, headers: tuple[GGUFHeader, ...], records: Mapping[int, Records]) -> None:
    needed = sum(tensor.n_bytes for _, tensor in _dense(headers)) + sum(record.n_bytes for record in records.values())
    if shutil.disk_usage(folder).free < needed + _SPARE_BYTES:
        raise OSError(f"it needs {needed >> 20} MiB of disk")


def _write(
    file: BinaryIO,
    headers: tuple[GGUFHeader, ...],
    blocks: Mapping[int, list[Place]],
    records: Mapping[int, Records],
    keys: Mapping[str, Numbers | tuple[str, ...] | str],
    progress: Progress | None,
) -> None:
    dense = list(_dense(headers))
    new = [NewTensor(tensor.name, tensor.dims, tensor.type) for _, tensor in dense]
    new += [NewTensor(f"blk.{block}.expert_pack", (records[block].n_bytes,), _BYTES) for block in sorted(blocks)]
    offsets = write_header(file, headers[0], new, drop=(*_SPLIT_KEYS, *PACK_KEYS), add=keys, alignment=RECORD_ALIGNMENT)
    total, done = sum(tensor.n_bytes for tensor in new), 0
    sources = {header.path: header.path.open("rb") for header in headers}
    try:
        for (header, tensor), offset in zip(dense, offsets, strict=False):
            _copy(sources[header.path], header.data_offset + tensor.offset, tensor.n_bytes, file, offset)
            done += tensor.n_bytes
            if progress:
                progress(done, total)
        for block, offset in zip(sorted(blocks), offsets[len(dense) :], strict=True):
            places = {tensor.name: (sources[header.path], header) for header, tensor in blocks[block]}
            for expert in range(records[block].offsets.shape[1]):
                _write_expert(file, offset, records[block], expert, places)
            done += records[block].n_bytes
            if progress:
                progress(done, total)
        file.truncate(offset + records[block].n_bytes)
    finally:
        for source in sources.values():
            source.close()


def _write_expert(
    file: BinaryIO, start: int, records: Records, expert: int, places: Mapping[str, tuple[BinaryIO, GGUFHeader]]
) -> None:
    for number, tensor in enumerate(records.tensors):
        columns, rows, experts = tensor.dims
        source, header = places[tensor.name]
        size = tensor.n_bytes // experts
        data = _read(source, header.data_offset + tensor.offset + expert * size, size)
        file.seek(start + int(records.offsets[number, expert]))
        if width := int(records.widths[number, expert]):
            matrix = np.frombuffer(data, np.uint8)
            file.write(narrow(tensor.type.code, columns, rows, width, matrix).tobytes())
        else:
            file.write(data)


def _copy(source: BinaryIO, start: int, size: int, target: BinaryIO, offset: int) -> None:
    target.seek(offset)
    for at in range(start, start + size, _CHUNK_BYTES):
        target.write(_read(source, at, min(_CHUNK_BYTES, start + size - at)))


def _read(source: BinaryIO, start: int, size: int) -> bytes:
    source.seek(start)
    data = source.read(size)
    if len(data) < size:
        raise InvalidModelFileError(f"{Path(source.name).name} ends before it should")
    return data
