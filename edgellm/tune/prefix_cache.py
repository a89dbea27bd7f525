"""What the frozen layers below an adapter make of each sequence, kept on disk for the later epochs.

Those layers compute the same every time (AutoFreeze, arXiv 2102.01386, and its like keep it in memory).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_ROOM_SHARE = 0.5  # of a disk's free space that a cache may take


class PrefixCache:
    """The residual stream that the lowest trained layer takes, (tokens, width), for each sequence by its number.

    Made from the user's text: the file has no name, so that it is nobody else's to open and goes with the process
    however that ends. It is read and written, not mapped, for a mapped file counts as resident memory.
    """

    def __init__(self, folder: Path, lengths: Sequence[int], width: int, dtype: torch.dtype = torch.bfloat16) -> None:
        """Takes the disk at once, for one that fills later would end the run. Raises OSError where there is no room.

        lengths: tokens of each sequence; dtype: float32 or bfloat16, as which streams are kept.
        """
        self._dtype = dtype
        self._width = width
        self._lengths = tuple(lengths)
        item = 4 if dtype == torch.float32 else 2
        self._starts = np.concatenate(([0], np.cumsum(np.asarray(self._lengths, np.int64) * width * item)))
        self.bytes = int(self._starts[-1])
        if self.bytes > _ROOM_SHARE * shutil.disk_usage(folder).free:
            raise OSError(f"{self.bytes} bytes are too much for the disk of {folder}")
        self._there = np.zeros(len(self._lengths), bool)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed in close)
        try:
            if self.bytes:
                os.posix_fallocate(self._file.fileno(), 0, self.bytes)
        except BaseException:
            self._file.close()
            raise

    def get(self, number: int) -> Tensor | None:
        """What was put, as float32; None if nothing was, or it cannot be read."""
        if not self._there[number]:
            return None
        stored = torch.empty(self._lengths[number], self._width, dtype=self._dtype)
        view = memoryview(stored.view(torch.uint8).numpy()).cast("B")
        try:
            if os.preadv(self._file.fileno(), [view], int(self._starts[number])) != len(view):
                return None
        except OSError:
            return None
        return stored.float()

    def put(self, number: int, stream: Tensor) -> Tensor:
        """Keeps a stream and returns what `get` will give of it, so that all epochs see the same."""
        kept = stream.to(self._dtype)
        view = memoryview(kept.contiguous().view(torch.uint8).numpy()).cast("B")
        try:
            written = os.pwritev(self._file.fileno(), [view], int(self._starts[number]))
            self._there[number] = written == len(view)
        except OSError:
            self._there[number] = False  # it is computed again each time
        return kept.float()

    def close(self) -> None:
        """Gives the disk back. Idempotent."""
        self._file.close()
        self._there[:] = False
