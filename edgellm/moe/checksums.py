"""A checksum of every expert's every matrix, so that flash that rots is noticed and not computed with.

Made on the first start that asks for them, from the file as it is then, and kept beside the copy of the dense part.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm.backend.experts import crc32c
from edgellm.errors import ModelLoadError
from edgellm.moe.arrays import read_array, write_array
from edgellm.moe.layout import ExpertLayout

Checksums = npt.NDArray[np.uint32]

_log = logging.getLogger(__name__)


def checksums_of(layout: ExpertLayout, path: Path) -> Checksums:
    """(tensors, experts): CRC-32C of the bytes in the file, read from `path` or made and written there.

    Raises ModelLoadError if the model's file cannot be read, or `path` not be written.
    """
    known = read_array(path, (len(layout.slices), layout.experts), np.uint32)
    if known is not None:
        return known
    _log.info("%s: reading %d MiB of experts for checksums, once", layout.name, layout.all_read_bytes >> 20)
    try:
        made = _make(layout)
        write_array(path, made)
    except OSError as error:
        raise ModelLoadError(f"checksums of {layout.name} cannot be made: {error.strerror or error}") from None
    return made


def _make(layout: ExpertLayout) -> Checksums:
    made = np.zeros((len(layout.slices), layout.experts), np.uint32)
    files = [path.open("rb", buffering=0) for path in layout.files]
    try:
        for number, piece in enumerate(layout.slices):
            file = files[piece.file]
            for expert in range(layout.experts):
                start, size = piece.offset_of(expert), piece.stored_bytes(expert)
                file.seek(start)
                data = file.read(size)
                if len(data) < size:
                    raise OSError(f"the file ends before {piece.name}")
                made[number, expert] = crc32c(data)
                if hasattr(os, "posix_fadvise"):  # what was read once need not stay in the page cache
                    os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)
    finally:
        for file in files:
            file.close()
    return made
