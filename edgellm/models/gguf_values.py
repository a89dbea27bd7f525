"""What a metadata key of a GGUF file may hold, once read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GGUFArray:
    """An array too long to keep: only what it is and where its first element (or first string's length) stands."""

    element_type: str
    length: int
    file_offset: int  # bytes from the start of the file


Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...] | GGUFArray
