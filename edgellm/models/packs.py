"""Expert packs: GGUF files of mixtures of experts in which all of an expert lies together (edgellm moe pack).

A pack has the keys and the dense tensors of the model that it was made of. In place of a block's stacked expert tensors
it has one tensor of bytes, `blk.N.expert_pack`: a record for each expert, each beginning at a multiple of the file's
alignment (4096), with the expert's matrices behind each other at multiples of 64. A matrix is what the stacked tensor
has of it, or, where the expert has a width, that narrowed to so many bits (kernels/narrow.h). The keys under
`edgellm.pack.` say what the stacked tensors were. llama.cpp does not know packs: it finds tensors missing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgellm.errors import InvalidModelFileError, ModelUnsupportedError
from edgellm.models.ggml_types import GGML_TYPES
from edgellm.models.gguf import GGUFHeader, TensorInfo
from edgellm.models.gguf_values import GGUFArray, Value
from edgellm.models.sanity import MAX_EXPERTS

STACKED_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate_up|up|gate|down)_exps\.weight")
"""Names of stacked expert tensors: one matrix for each expert, (experts, rows, columns)."""

PACK_NAME_END = ".pack"
"""How the name of a pack ends, if nothing else is asked for: MODEL.pack.gguf."""

PACK_TENSOR = re.compile(r"blk\.(\d+)\.expert_pack")
VERSION_KEY = "edgellm.pack.version"
NAMES_KEY = "edgellm.pack.tensors"
TYPES_KEY = "edgellm.pack.types"
DIMS_KEY = "edgellm.pack.dims"
WIDTHS_KEY = "edgellm.pack.widths"
PACK_KEYS = (VERSION_KEY, NAMES_KEY, TYPES_KEY, DIMS_KEY, WIDTHS_KEY)
VERSION = 1
RECORD_ALIGNMENT = 4096
MATRIX_ALIGNMENT = 64

_MOST_EXPANSION = 8  # of a matrix, from 2 bits to its type


@dataclass(frozen=True, slots=True)
class PackContent:
    """What is in a pack. Stacked tensors have no place of their own: their offset is 0."""

    stacked: tuple[TensorInfo, ...]
    widths: tuple[bytes, ...]  # (blocks, experts), blocks by number: bits; 0: as the tensor's type has it


def block_of(tensor: TensorInfo) -> int:
    """The block of a stacked expert tensor. Raises ValueError for another."""
    match = STACKED_EXPERTS.fullmatch(tensor.name)
    if match is None:
        raise ValueError(f"{tensor.name} is not a stacked expert tensor")
    return int(match[1])


def is_pack(header: GGUFHeader) -> bool:
    return VERSION_KEY in header.metadata


def read_pack(header: GGUFHeader) -> PackContent:
    """What the pack with this header holds. Raises InvalidModelFileError, ModelUnsupportedError for a later version."""
    version = header.metadata[VERSION_KEY]
    if version != VERSION:
        raise ModelUnsupportedError(
            f"{header.path.name} is an expert pack of version {version}, and {VERSION} is known"
        )
    names, types, dims = (header.metadata.get(key) for key in (NAMES_KEY, TYPES_KEY, DIMS_KEY))
    if not (isinstance(names, tuple) and isinstance(types, tuple) and isinstance(dims, tuple)):
        raise _unsound(header, "it does not say what was packed")
    if len(names) != len(types) or 3 * len(names) != len(dims) or not names or len(set(names)) != len(names):
        raise _unsound(header, "what it says was packed does not fit together")
    stacked = tuple(
        _stacked(header, names[index], types[index], dims[3 * index : 3 * index + 3]) for index in range(len(names))
    )
    blocks = {block_of(tensor) for tensor in stacked}
    experts = {tensor.dims[2] for tensor in stacked}
    there = {int(match[1]) for tensor in header.tensors if (match := PACK_TENSOR.fullmatch(tensor.name))}
    places = {STACKED_EXPERTS.sub(r"\2", tensor.name) + str(block_of(tensor)) for tensor in stacked}
    if blocks != there or len(experts) != 1 or len(places) != len(stacked):
        raise _unsound(header, "its blocks are not those that it says were packed")
    return PackContent(stacked, _widths(header, len(blocks), experts.pop()))


def model_tensors(header: GGUFHeader) -> tuple[TensorInfo, ...]:
    """The tensors of the model in this file: those that are there, and those that are packed, as they were."""
    if not is_pack(header):
        return header.tensors
    dense = tuple(tensor for tensor in header.tensors if not PACK_TENSOR.fullmatch(tensor.name))
    return dense + read_pack(header).stacked


def _stacked(header: GGUFHeader, name: Value, code: Value, dims: tuple[Value, ...]) -> TensorInfo:
    kind = GGML_TYPES.get(code) if isinstance(code, int) else None
    sizes = tuple(dim for dim in dims if isinstance(dim, int) and 0 < dim < 1 << 31)
    if kind is None or len(sizes) != 3 or not isinstance(name, str) or not STACKED_EXPERTS.fullmatch(name):
        raise _unsound(header, f"{name!r} cannot have been packed")
    columns, rows, experts = sizes
    if columns % kind.block_elements:
        raise _unsound(header, f"rows of {name} have {columns} elements")
    n_bytes = columns // kind.block_elements * kind.block_bytes * rows * experts
    if experts > MAX_EXPERTS or n_bytes > _MOST_EXPANSION * header.file_bytes:
        raise _unsound(header, f"{name} would be larger than what can have been packed")
    return TensorInfo(name, sizes, kind, 0, n_bytes)


def _widths(header: GGUFHeader, blocks: int, experts: int) -> tuple[bytes, ...]:
    found = header.metadata.get(WIDTHS_KEY)
    raw = b""
    if header.value_types.get(WIDTHS_KEY) == "uint8[]":
        if isinstance(found, GGUFArray):
            with header.path.open("rb") as file:
                file.seek(found.file_offset)
                raw = file.read(found.length)
        elif isinstance(found, tuple):
            raw = bytes(width for width in found if isinstance(width, int))
    if len(raw) != blocks * experts:
        raise _unsound(header, "it does not say how wide its experts are")
    return tuple(raw[row * experts : (row + 1) * experts] for row in range(blocks))


def _unsound(header: GGUFHeader, what: str) -> InvalidModelFileError:
    return InvalidModelFileError(f"{header.path.name} is not a sound expert pack: {what}")
