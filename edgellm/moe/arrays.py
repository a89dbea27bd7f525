"""Arrays kept in files beside a model's copy: read with suspicion, written in one step."""

from __future__ import annotations

import io
import logging
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from edgellm.models.files import write_atomic

_log = logging.getLogger(__name__)
_Number = TypeVar("_Number", bound=np.generic)
_HEADER_BYTES = 4096  # a header takes less; it is padded to a multiple of 64


def read_array(path: Path, shape: tuple[int, ...], kind: type[_Number]) -> npt.NDArray[_Number] | None:
    """The array; None if there is no file, or it does not hold one of this shape and type, which is logged."""
    try:
        with path.open("rb") as file:
            if not _holds(file, shape, np.dtype(kind)):
                _log.warning("%s belongs to another model, and is begun anew", path)
                return None
            found: npt.NDArray[_Number] = np.lib.format.read_array(file, allow_pickle=False)
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        _log.warning("%s cannot be read, and is begun anew: %s", path, error)
        return None


def _holds(file: BinaryIO, shape: tuple[int, ...], kind: np.dtype[Any]) -> bool:
    """Whether the file says that it holds such an array, and is as long: nothing is allocated by what it says.

    Raises ValueError if it is not NumPy's.
    """
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # what every array of plain numbers is written as
        raise ValueError(f"version {version} of NumPy's format")
    found_shape, _, found_kind = np.lib.format.read_array_header_1_0(file, max_header_size=_HEADER_BYTES)
    whole = file.tell() + math.prod(shape) * kind.itemsize
    fits = (found_shape, found_kind) == (shape, kind) and os.fstat(file.fileno()).st_size == whole
    file.seek(0)
    return fits


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Into a folder that is there: one that was removed in the meantime stays away. Raises OSError."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getvalue(), make_folders=False)
