"""GGUF files written byte by byte, so that a test can make any of them wrong in exactly one way."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
_CODES = {UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?"}
_CODES |= {UINT64: "Q", INT64: "q", FLOAT64: "d"}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(code: int, item: object) -> bytes:
    """The bytes of a value of type `code`; of an array, `item` is (element code, elements)."""
    if code == STRING:
        return string(item)  # type: ignore[arg-type]
    if code == ARRAY:
        element, items = item  # type: ignore[misc]
        return struct.pack("<IQ", element, len(items)) + b"".join(value(element, part) for part in items)
    return struct.pack("<" + _CODES[code], item)


def pair(key: str | bytes, code: int, item: object) -> bytes:
    return string(key) + struct.pack("<I", code) + value(code, item)


def tensor(name: str | bytes, dims: tuple[int, ...], code: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


ARCHITECTURE = pair("general.architecture", STRING, "llama")


@dataclass
class Raw:
    """A file in parts. The default is sound: one F32 tensor of 4 x 2 elements, 32 bytes of data."""

    magic: bytes = b"GGUF"
    version: int = 3
    pairs: list[bytes] = field(default_factory=lambda: [ARCHITECTURE])
    tensors: list[bytes] = field(default_factory=lambda: [tensor("a.weight", (4, 2))])
    data: bytes = bytes(32)
    alignment: int = 32
    n_tensors: int | None = None
    n_pairs: int | None = None

    def build(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_pairs = len(self.pairs) if self.n_pairs is None else self.n_pairs
        head = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_pairs)
        head += b"".join(self.pairs) + b"".join(self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path
