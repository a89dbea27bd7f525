"""Writes the header of a GGUF file that is made out of another one: its keys as they are, other tensors."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from edgellm.models.ggml_types import GGMLType
from edgellm.models.gguf import GGUFHeader

_CODES = {"uint8": (0, "B"), "uint32": (4, "I"), "int32": (5, "i"), "float32": (6, "f"), "uint64": (10, "Q")}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written. `dims` is in ggml's order."""

    name: str
    dims: tuple[int, ...]
    type: GGMLType

    @property
    def n_bytes(self) -> int:
        elements = 1
        for dim in self.dims:
            elements *= dim
        return elements // self.type.block_elements * self.type.block_bytes


@dataclass(frozen=True, slots=True)
class Numbers:
    """A value for a key: one number, or an array of them. `kind` is uint8, uint32, int32, uint64 or float32."""

    kind: str
    values: tuple[int, ...] | tuple[float, ...] | int | float


def write_header(
    target: BinaryIO,
    source: GGUFHeader,
    tensors: Iterable[NewTensor],
    *,
    drop: Iterable[str] = (),
    add: Mapping[str, Numbers | tuple[str, ...] | str] | None = None,
    alignment: int | None = None,
) -> list[int]:
    """Writes a header at the start of `target`, and says where in the file each tensor's data belong.

    Keys are those of `source` without those in `drop`, and `add`. `alignment` of the data is the source's unless it is
    given. Raises OSError.
    """
    tensors = list(tensors)
    alignment = alignment or source.alignment
    added = {"general.alignment": Numbers("uint32", alignment), **(add or {})}
    kept = [place for key, place in source.places.items() if key not in {*drop, *added}]
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(kept) + len(added)))
    with source.path.open("rb") as file:
        for start, end in kept:
            file.seek(start)
            head += file.read(end - start)
    for key, value in added.items():
        head += _text(key) + _value(value)
    offset, offsets = 0, []
    for tensor in tensors:
        head += _text(tensor.name) + struct.pack("<I", len(tensor.dims))
        head += struct.pack(f"<{len(tensor.dims)}QIQ", *tensor.dims, tensor.type.code, offset)
        offsets.append(offset)
        offset += -(-tensor.n_bytes // alignment) * alignment
    start = -(-len(head) // alignment) * alignment
    target.seek(0)
    target.write(head.ljust(start, b"\0"))
    return [start + offset for offset in offsets]


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Numbers | tuple[str, ...] | str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, tuple):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    code, letter = _CODES[value.kind]
    if isinstance(value.values, tuple):
        return struct.pack(f"<IIQ{len(value.values)}{letter}", _ARRAY, code, len(value.values), *value.values)
    return struct.pack(f"<I{letter}", code, value.values)
