"""Reads and checks GGUF headers (versions 2 and 3, little-endian) before llama.cpp sees the file.

llama.cpp's loader is C++ and aborts the process on part of what can be wrong with a file, so nothing reaches it that
has not passed here. The reader is bounded: it never allocates by a number that stands in the file without checking it
against the bytes that are really there, and it keeps long arrays (vocabularies) only as their length and place.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and what ggml/src/gguf.cpp accepts of it.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NoReturn

from edgellm.errors import InvalidModelFileError, ModelNotFoundError
from edgellm.models.ggml_types import GGML_TYPES, REMOVED_TYPES, GGMLType
from edgellm.models.gguf_values import GGUFArray, Value
from edgellm.models.sanity import check_metadata, check_tensor

MAX_HEADER_BYTES = 256 << 20  # the largest vocabularies in use need about 16 MB
MAX_STRING_BYTES = 8 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_ALIGNMENT = 1 << 20
MAX_KEPT_ELEMENTS = 4096  # longer arrays become a GGUFArray
_MAX_KEY_BYTES = 65_535  # the specification's own limit
_MAX_TENSOR_NAME_BYTES = 63  # GGML_MAX_NAME - 1
_MAX_DIMS = 4
_MAX_INT64 = (1 << 63) - 1
_FIRST_READ_BYTES = 1 << 20
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_STRING, _ARRAY, _BOOL = 8, 9, 7
# value type -> (name, struct code, bytes)
_SCALARS: dict[int, tuple[str, str, int]] = {
    0: ("uint8", "B", 1),
    1: ("int8", "b", 1),
    2: ("uint16", "H", 2),
    3: ("int16", "h", 2),
    4: ("uint32", "I", 4),
    5: ("int32", "i", 4),
    6: ("float32", "f", 4),
    _BOOL: ("bool", "?", 1),
    10: ("uint64", "Q", 8),
    11: ("int64", "q", 8),
    12: ("float64", "d", 8),
}
_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer; the real file was not downloaded"),
    (b"PK\x03\x04", "a ZIP archive, perhaps a PyTorch checkpoint; convert it to GGUF first"),
    (b"<", "an HTML page, perhaps of a failed download"),
    (b"ggml", "the GGML format that came before GGUF; convert it first"),
    (b"tjgg", "the GGJT format that came before GGUF; convert it first"),
    (b"lmgg", "the GGML format that came before GGUF; convert it first"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. `dims` is in ggml's order: the row length first."""

    name: str
    dims: tuple[int, ...]
    type: GGMLType
    offset: int  # bytes from the start of the data section
    n_bytes: int

    @property
    def elements(self) -> int:
        count = 1
        for dim in self.dims:
            count *= dim
        return count


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """A header that passed every check. `value_types` names each key's type, e.g. "uint32" or "string[]"; `places` has
    the bytes of the file, first and behind the last, that key, type and value take."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    value_types: Mapping[str, str]
    places: Mapping[str, tuple[int, int]]
    tensors: tuple[TensorInfo, ...]
    data_offset: int  # bytes from the start of the file
    file_bytes: int
    alignment: int

    @property
    def split_count(self) -> int:
        """Files that the model is split over; 1 for a whole model."""
        count = self.metadata.get("split.count", 1)
        return count if isinstance(count, int) and count > 1 else 1


def read_header(path: Path | str) -> GGUFHeader:
    """The header of the GGUF file at `path`, checked in full.

    Raises ModelNotFoundError if there is no such file, InvalidModelFileError with what is wrong and at which byte.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidModelFileError(f"{path}: not a regular file")
        with path.open("rb") as file:
            return _HeaderReader(file, path).read()
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(f"There is no model file at {path}.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InvalidModelFileError(f"{path}: cannot be read: {error}") from None


class _HeaderReader:
    """A cursor over the start of a file. Reads ahead in growing pieces, never past the end or MAX_HEADER_BYTES."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._file_bytes = file.seek(0, 2)
        file.seek(0)
        self._data = b""
        self._position = 0

    # --- reading

    def _fail(self, message: str, position: int | None = None) -> NoReturn:
        where = self._position if position is None else position
        raise InvalidModelFileError(f"{self._path.name} is not a sound GGUF file: {message} (at byte {where})")

    def _load(self, end: int, what: str) -> None:
        """Make bytes up to `end` available in self._data."""
        if end > self._file_bytes:
            self._fail(f"truncated: {what} would end at byte {end}, but the file has only {self._file_bytes} bytes")
        if end > MAX_HEADER_BYTES:
            self._fail(f"the header is larger than {MAX_HEADER_BYTES >> 20} MiB")
        wanted = min(max(end, 2 * len(self._data), _FIRST_READ_BYTES), self._file_bytes, MAX_HEADER_BYTES)
        self._data += self._file.read(wanted - len(self._data))
        if len(self._data) < end:
            self._fail("the file shrank while it was read")

    def _take(self, n_bytes: int, what: str) -> int:
        """Step over `n_bytes`; the position where they start."""
        start = self._position
        if start + n_bytes > len(self._data):
            self._load(start + n_bytes, what)
        self._position = start + n_bytes
        return start

    def _u32(self, what: str) -> int:
        start = self._take(4, what)  # first: it may replace self._data
        return int(_U32.unpack_from(self._data, start)[0])

    def _u64(self, what: str) -> int:
        start = self._take(8, what)
        return int(_U64.unpack_from(self._data, start)[0])

    def _string(self, what: str, limit: int) -> bytes:
        length = self._u64(f"the length of {what}")
        if length > limit:
            self._fail(f"{what} claims {length} bytes, more than the limit of {limit}")
        start = self._take(length, what)
        return self._data[start : start + length]

    def _name(self, what: str, limit: int) -> str:
        start = self._position
        raw = self._string(what, limit)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is not UTF-8", start)
        if not text or "\x00" in text:
            self._fail(f"{what} is empty or holds a null byte", start)
        return text

    # --- the parts of a header

    def read(self) -> GGUFHeader:
        version = self._read_magic_and_version()
        n_tensors = self._u64("the tensor count")
        n_keys = self._u64("the key count")
        self._check_count(n_tensors, MAX_TENSORS, 24, "tensors")
        self._check_count(n_keys, MAX_KEYS, 13, "keys")
        metadata: dict[str, Value] = {}
        types: dict[str, str] = {}
        places: dict[str, tuple[int, int]] = {}
        for index in range(n_keys):
            start = self._position
            key = self._read_pair(index, metadata, types)
            places[key] = (start, self._position)
        problem = check_metadata(metadata, types)
        if problem:
            self._fail(problem)
        alignment = self._alignment(metadata, types)
        tensors, data_offset = self._read_tensors(n_tensors, alignment)
        return GGUFHeader(
            path=self._path,
            version=version,
            metadata=MappingProxyType(metadata),
            value_types=MappingProxyType(types),
            places=MappingProxyType(places),
            tensors=tensors,
            data_offset=data_offset,
            file_bytes=self._file_bytes,
            alignment=alignment,
        )

    def _read_magic_and_version(self) -> int:
        if self._file_bytes == 0:
            self._fail("the file is empty")
        self._load(min(self._file_bytes, 32), "the magic")
        for prefix, meaning in _FOREIGN:
            if self._data.startswith(prefix):
                self._fail(f"it is {meaning}")
        magic = self._data[: min(4, self._file_bytes)]
        if magic != b"GGUF"[: len(magic)]:
            self._fail(f"wrong magic {magic!r}, expected b'GGUF'")
        self._take(4, "the magic")
        version = self._u32("the version")
        if version & 0xFFFF == 0 and version:
            self._fail("it is big-endian; only little-endian files can be served", 4)
        if version not in (2, 3):
            self._fail(f"version {version} is not supported, only 2 and 3", 4)
        return version

    def _check_count(self, count: int, limit: int, least_bytes: int, what: str) -> None:
        if count > limit:
            self._fail(f"it claims {count} {what}, more than the limit of {limit}")
        if count * least_bytes > self._file_bytes - self._position:
            self._fail(f"truncated: {count} {what} do not fit the {self._file_bytes} bytes of the file")

    def _read_pair(self, index: int, metadata: dict[str, Value], types: dict[str, str]) -> str:
        """The key."""
        start = self._position
        key = self._name(f"key {index}", _MAX_KEY_BYTES)
        if key in metadata:
            self._fail(f"duplicate key {key!r}", start)
        code = self._u32(f"the type of {key!r}")
        if code == _ARRAY:
            metadata[key], types[key] = self._read_array(key)
        elif code == _STRING:
            metadata[key] = self._string(f"the value of {key!r}", MAX_STRING_BYTES).decode(errors="replace")
            types[key] = "string"
        elif code in _SCALARS:
            types[key], letter, n_bytes = _SCALARS[code]
            at = self._take(n_bytes, f"the value of {key!r}")
            metadata[key] = struct.unpack_from("<" + letter, self._data, at)[0]
        else:
            self._fail(f"key {key!r} has the unknown value type {code}")
        return key

    def _read_array(self, key: str) -> tuple[Value, str]:
        code = self._u32(f"the element type of {key!r}")
        length = self._u64(f"the length of {key!r}")
        if code == _ARRAY:
            self._fail(f"key {key!r} is an array of arrays")
        if code != _STRING and code not in _SCALARS:
            self._fail(f"key {key!r} has the unknown element type {code}")
        name, letter, n_bytes = ("string", "", 8) if code == _STRING else _SCALARS[code]
        left = self._file_bytes - self._position
        if length * n_bytes > left:
            self._fail(f"truncated: the {length} elements of {key!r} do not fit the {left} bytes that follow")
        start = self._position
        kept: Value = GGUFArray(name, length, start)
        if code == _STRING:
            strings = self._read_strings(key, length)
            if strings is not None:
                kept = tuple(item.decode(errors="replace") for item in strings)
        else:
            self._take(length * n_bytes, f"the elements of {key!r}")
            if length <= MAX_KEPT_ELEMENTS:
                kept = struct.unpack_from(f"<{length}{letter}", self._data, start)
        return kept, f"{name}[]"

    def _read_strings(self, key: str, count: int) -> list[bytes] | None:
        """Step over `count` strings; their bytes if there are few. This loop is most of the time of read_header.

        Tokens must differ from each other: llama.cpp aborts the process where two are equal.
        """
        seen: set[bytes] | None = set() if key == "tokenizer.ggml.tokens" else None
        kept: list[bytes] | None = [] if count <= MAX_KEPT_ELEMENTS else None
        data, position, unpack = self._data, self._position, _U64.unpack_from
        for index in range(count):
            end = position + 8
            if end > len(data):
                self._load(end, f"string {index} of {key!r}")
                data = self._data
            length = unpack(data, position)[0]
            if length > MAX_STRING_BYTES:
                self._fail(f"string {index} of {key!r} claims {length} bytes", position)
            start, end = end, end + length
            if end > len(data):
                self._load(end, f"string {index} of {key!r}")
                data = self._data
            if seen is not None:
                item = data[start:end]
                if b"\x00" in item or not item:  # llama.cpp cuts at a null byte and renames the empty
                    item = item.partition(b"\x00")[0] or b"[EMPTY_%d]" % index
                if item in seen:
                    self._fail(f"token {index} {item!r} stands twice in the vocabulary", position)
                seen.add(item)
            if kept is not None:
                kept.append(data[start:end])
            position = end
        self._position = position
        return kept

    def _alignment(self, metadata: Mapping[str, Value], types: Mapping[str, str]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if types.get("general.alignment", "uint32") != "uint32" or not isinstance(alignment, int):
            self._fail(f"general.alignment must be uint32, not {types['general.alignment']}")
        if alignment < 1 or alignment & (alignment - 1) or alignment > MAX_ALIGNMENT:
            self._fail(f"general.alignment is {alignment}, not a power of two up to {MAX_ALIGNMENT}")
        return alignment

    def _read_tensors(self, count: int, alignment: int) -> tuple[tuple[TensorInfo, ...], int]:
        """(tensors, data offset). Tensors must lie in order and without gaps, as llama.cpp demands."""
        tensors: list[TensorInfo] = []
        names: set[str] = set()
        for index in range(count):
            start = self._position
            tensor = self._read_tensor(index)
            if tensor.name in names:
                self._fail(f"duplicate tensor name {tensor.name!r}", start)
            names.add(tensor.name)
            tensors.append(tensor)
        data_offset = _pad(self._position, alignment) if count else self._position
        expected = 0
        for tensor in tensors:
            self._check_place(tensor, expected, data_offset, alignment)
            expected = _pad(tensor.offset + tensor.n_bytes, alignment)
        return tuple(tensors), data_offset

    def _read_tensor(self, index: int) -> TensorInfo:
        name = self._name(f"the name of tensor {index}", _MAX_TENSOR_NAME_BYTES)
        n_dims = self._u32(f"the number of dimensions of {name!r}")
        if n_dims > _MAX_DIMS:
            self._fail(f"tensor {name!r} has {n_dims} dimensions, more than {_MAX_DIMS}")
        at = self._take(8 * n_dims, f"the dimensions of {name!r}")
        dims: tuple[int, ...] = struct.unpack_from(f"<{n_dims}Q", self._data, at)
        elements = 1
        for dim in dims:
            elements *= dim
        if elements == 0 or elements > _MAX_INT64:
            self._fail(f"tensor {name!r} has impossible dimensions {list(dims)}", at)
        code = self._u32(f"the type of {name!r}")
        if code not in GGML_TYPES:
            gone = f"{REMOVED_TYPES[code]}, which llama.cpp no longer reads" if code in REMOVED_TYPES else "unknown"
            self._fail(f"tensor {name!r} has type {code}: {gone}")
        kind = GGML_TYPES[code]
        if fault := check_tensor(name, n_dims, kind.name):
            self._fail(f"tensor {name!r} {fault}")
        row = dims[0] if dims else 1
        if row % kind.block_elements:
            self._fail(f"rows of {name!r} have {row} elements, not a multiple of {kind.name}'s {kind.block_elements}")
        n_bytes = elements // kind.block_elements * kind.block_bytes
        return TensorInfo(name, dims, kind, self._u64(f"the offset of {name!r}"), n_bytes)

    def _check_place(self, tensor: TensorInfo, expected: int, data_offset: int, alignment: int) -> None:
        if tensor.offset % alignment:
            self._fail(f"the offset {tensor.offset} of {tensor.name!r} is not a multiple of {alignment}")
        if tensor.offset < expected:
            self._fail(f"tensor {tensor.name!r} at offset {tensor.offset} overlaps the one before it")
        if tensor.offset > expected:
            self._fail(f"tensor {tensor.name!r} is at offset {tensor.offset}, expected {expected}")
        end = data_offset + tensor.offset + tensor.n_bytes
        if end > self._file_bytes:
            self._fail(f"truncated: {tensor.name!r} ends at byte {end}, the file at byte {self._file_bytes}")


def _pad(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
