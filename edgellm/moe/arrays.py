"""Arrays kept in files beside a model's copy: read with suspicion, written in one step."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgellm.models.files import write_atomic

_log = logging.getLogger(__name__)
_Number = TypeVar("_Number", bound=np.generic)


def read_array(path: Path, shape: tuple[int, ...], kind: type[_Number]) -> npt.NDArray[_Number] | None:
    """The array; None if there is no file, or it does not hold one of this shape and type, which is logged."""
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        _log.warning("%s cannot be read, and is begun anew: %s", path, error)
        return None
    if isinstance(found, np.ndarray) and found.shape == shape and found.dtype == kind:
        return found
    _log.warning("%s belongs to another model, and is begun anew", path)
    return None


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Raises OSError."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getvalue())
