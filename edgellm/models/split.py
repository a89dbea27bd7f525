"""Models split over several files, `NAME-00001-of-00003.gguf` and so on: each part a GGUF file of its own."""

from __future__ import annotations

import re
from pathlib import Path

from edgellm.errors import InvalidModelFileError, ModelNotFoundError
from edgellm.models.gguf import GGUFHeader, read_header

MAX_PARTS = 999
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def split_names(file_name: str) -> tuple[str, ...]:
    """The names of all parts of the model that `file_name` is a part of, in order; itself alone if it is whole.

    Works on names, also with directories in front; no file is looked at.
    """
    match = _PART.fullmatch(file_name)
    if match is None or not 1 <= int(match["count"]) <= MAX_PARTS:
        return (file_name,)
    return tuple(
        f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)
    )


def model_stem(file_name: str) -> str:
    """The model's name in its file name: without `.gguf` and without the part number."""
    match = _PART.fullmatch(file_name)
    return match["stem"] if match else re.sub(r"\.gguf$", "", file_name, flags=re.IGNORECASE)


def split_paths(first: Path | str) -> tuple[Path, ...]:
    """The files of the model whose first file is `first`, in order; `first` alone if the model is whole.

    Raises as `split_headers` does.
    """
    return tuple(header.path for header in split_headers(read_header(first)))


def split_headers(first: GGUFHeader) -> tuple[GGUFHeader, ...]:
    """The checked headers of every part, `first` in front.

    Raises InvalidModelFileError if a part is missing, is not the part its name says, or repeats a tensor.
    """
    path, count = first.path, first.split_count
    number = first.metadata.get("split.no", 0)
    names = split_names(path.name)
    if number != 0:
        raise InvalidModelFileError(f"{path.name} is a later part of a split model; name the first part, {names[0]}")
    if count == 1:
        return (first,)
    if len(names) != count or names[0] != path.name:
        raise InvalidModelFileError(
            f"{path.name} is the first of {count} files, so its name must end in -00001-of-{count:05d}.gguf"
        )
    headers = [first]
    for index, name in enumerate(names[1:], start=1):
        try:
            header = read_header(path.with_name(name))
        except ModelNotFoundError:
            raise InvalidModelFileError(f"{path.name}: part {index + 1} of {count} is missing: {name}") from None
        if header.metadata.get("split.no") != index or header.split_count != count:
            raise InvalidModelFileError(f"{name} is not part {index + 1} of {count} of its model")
        headers.append(header)
    _check_tensors(headers)
    return tuple(headers)


def _check_tensors(headers: list[GGUFHeader]) -> None:
    names = [tensor.name for header in headers for tensor in header.tensors]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidModelFileError(f"{headers[0].path.name}: tensor {twice!r} stands in more than one part")
    expected = headers[0].metadata.get("split.tensors.count", len(names))
    if expected != len(names):
        raise InvalidModelFileError(f"{headers[0].path.name}: the parts hold {len(names)} tensors, expected {expected}")
