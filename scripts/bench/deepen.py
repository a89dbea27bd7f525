"""A model made larger by giving it its layers several times over: its text is noise, its steps cost what they cost."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from bench.client import BenchError
from edgellm.models.files import publish, temporary_beside
from edgellm.models.gguf import read_header
from edgellm.models.gguf_write import NewTensor, Numbers, write_header
from edgellm.tune.architecture import read_architecture

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def deepen(source: Path, target: Path, times: int) -> None:
    """Writes to `target` the model of `source` with all its layers `times` times. Raises BenchError for a split file,
    and what reading models raises."""
    header = read_header(source)
    if header.split_count > 1:
        raise BenchError(f"{source.name}: a model in several files cannot be made deeper")
    shape = read_architecture([header])
    chosen = []
    for info in header.tensors:
        match = _BLOCK.fullmatch(info.name)
        if match is None:
            chosen.append((info.name, info))
        else:
            layers = range(int(match[1]), times * shape.layers, shape.layers)
            chosen += [(f"blk.{layer}.{match[2]}", info) for layer in layers]
    tensors = [NewTensor(name, info.dims, info.type) for name, info in chosen]
    keys = {f"{shape.name}.block_count": Numbers("uint32", times * shape.layers)}
    data = np.memmap(source, np.uint8, "r")
    with temporary_beside(target) as temporary:
        with temporary.open("wb") as file:
            places = write_header(file, header, tensors, add=keys)
            for place, (_, info) in zip(places, chosen, strict=True):
                start = header.data_offset + info.offset
                file.seek(place)
                file.write(data[start : start + info.n_bytes].tobytes())
            file.write(bytes(-file.tell() % header.alignment))
        publish(temporary, target)
