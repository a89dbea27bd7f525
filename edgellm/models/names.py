"""Names of stored files, and the only way from a name to a path.

A model's name is its place under the models directory without `.gguf`, in lower case: a file pulled from the Hub is
`owner/repo/file-stem`. A name is checked part by part before it becomes a path, so none can lead outside.
"""

from __future__ import annotations

import re
from pathlib import Path

MAX_PARTS = 6
_MAX_PART_CHARS = 200
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+=@-]*")
_UNFIT = re.compile(r"[^a-z0-9._+-]+")


def is_name(name: str) -> bool:
    """Whether every part of `name` is a plain file name: no empty part, none that begins with a dot."""
    parts = name.split("/")
    return len(parts) <= MAX_PARTS and all(
        len(part) <= _MAX_PART_CHARS and _PART.fullmatch(part) is not None for part in parts
    )


def place(root: Path, name: str, suffix: str = "") -> Path:
    """The path of `name` under `root`. Raises ValueError if the name is unsound or a link leads outside `root`."""
    if not is_name(name):
        raise ValueError(f"not a name: {name!r}")
    path = root.joinpath(*(name + suffix).split("/"))
    if not path.parent.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{name!r} leads outside {root}")
    return path


def slug(text: str) -> str:
    """`text` as a name: lower case, with `-` for every character that may not stand in one.

    Raises ValueError if nothing usable is left.
    """
    parts = [_UNFIT.sub("-", part.lower()).lstrip("._+-") for part in text.split("/")]
    name = "/".join(part for part in parts if part)
    if not is_name(name):
        raise ValueError(f"no name can be made of {text!r}")
    return name
