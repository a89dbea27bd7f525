"""A model with some of another's layers, and perhaps a smaller vocabulary: its weights byte for byte."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgellm.errors import ConfigError, ModelUnsupportedError
from edgellm.models.files import publish, temporary_beside
from edgellm.models.gguf import GGUFHeader, TensorInfo, read_header
from edgellm.models.gguf_write import NewTensor, Numbers, write_header
from edgellm.tune.architecture import Architecture, read_architecture
from edgellm.tune.draft.vocabulary import cut_vocabulary

Choice = Literal["first", "ends", "even"]
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those whose layers are all alike, wherever they stand."""

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_OF_VOCABULARY = ("token_embd.weight", "output.weight")
_UNTRUE = ("general.size_label",)  # after a cut


def choose_layers(total: int, count: int, choice: Choice) -> tuple[int, ...]:
    """Which `count` of `total` layers stay: the first, the first and the very last ("ends"), or evenly spread ones.

    Raises ConfigError if there are not so many.
    """
    if not 1 <= count <= total:
        raise ConfigError(f"the model has {total} layers: 1 to {total} can stay, not {count}")
    if choice == "first":
        return tuple(range(count))
    if choice == "ends":
        return (*range(count - 1), total - 1)
    return tuple(round(index * (total - 1) / max(1, count - 1)) for index in range(count))


def cut_model(source: Path, target: Path, *, layers: Sequence[int], vocabulary: int | None = None) -> None:
    """Writes to `target`, whole or not at all, what `source` has of these layers, in rising order.

    With `vocabulary`, tokens are left out until at most so many are there, and with them their rows of the embedding
    and the output matrix. Raises what `read_header`, `read_architecture` and `cut_vocabulary` raise, ConfigError for
    layers that are not there, OSError.
    """
    header = read_header(source)
    shape = _check(header, layers)
    keys: dict[str, Numbers | tuple[str, ...] | str] = {
        f"{shape.name}.block_count": Numbers("uint32", len(layers)),
    }
    rows: npt.NDArray[np.int64] | None = None
    if vocabulary is not None:
        cut = cut_vocabulary(header, vocabulary)
        rows = np.asarray(cut.kept, np.int64)
        if rows[-1] >= shape.vocabulary:
            raise ModelUnsupportedError(f"{source.name}: it has tokens that its embedding lacks")
        keys |= cut.keys
    chosen = list(_chosen(header, layers))
    new = []
    for name, info in chosen:
        dims = info.dims if rows is None or name not in _OF_VOCABULARY else (info.dims[0], len(rows))
        new.append(NewTensor(name, dims, info.type))
    data = np.memmap(source, np.uint8, "r")
    with temporary_beside(target) as temporary:
        with temporary.open("wb") as file:
            places = write_header(file, header, new, drop=_UNTRUE, add=keys)
            for place, tensor, (_, info) in zip(places, new, chosen, strict=True):
                start = header.data_offset + info.offset
                part = data[start : start + info.n_bytes]
                if tensor.dims != info.dims and rows is not None:
                    part = part.reshape(info.dims[1], -1)[rows]
                file.seek(place)
                file.write(np.ascontiguousarray(part).tobytes())
            file.write(bytes(-file.tell() % header.alignment))  # readers want the last tensor's padding, too
        publish(temporary, target)


def _check(header: GGUFHeader, layers: Sequence[int]) -> Architecture:
    name = header.path.name
    if header.split_count > 1:
        raise ModelUnsupportedError(f"{name}: a model in several files cannot be cut; join them first")
    shape = read_architecture([header])
    if shape.name not in ARCHITECTURES:
        raise ModelUnsupportedError(f"{name}: only {', '.join(ARCHITECTURES)} can be cut, not {shape.name}")
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= shape.layers:
        raise ConfigError(f"layers to keep must rise, from 0 to {shape.layers - 1}: {list(layers)}")
    return shape


def _chosen(header: GGUFHeader, layers: Sequence[int]) -> Iterator[tuple[str, TensorInfo]]:
    """Tensors that stay, with their new names, in the order of the file."""
    numbers = {old: new for new, old in enumerate(layers)}
    for info in header.tensors:
        match = _BLOCK.fullmatch(info.name)
        if match is None:
            yield info.name, info
        elif int(match[1]) in numbers:
            yield f"blk.{numbers[int(match[1])]}.{match[2]}", info
