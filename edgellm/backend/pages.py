"""Huge pages for what a step reads: weights, keys and values, and the compute buffers.

A step walks through all of the weights, in pages of 4 KiB unless it is told otherwise, and the processor spends a
measurable part of it on address translation. docs/benchmarks.md has the figures. Best effort, and Linux only:
elsewhere, and where the kernel refuses, nothing happens.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_LARGE_BYTES = 16 << 20  # hardly anything but llama.cpp's buffers is this large; what else is loses nothing
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # Linux 6.1
_SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MODE_FILE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *(\[anon:[^]]*\])?$")


def huge_page_bytes() -> int | None:
    """The size of a huge page here; None where there are none, or they are switched off."""
    if sys.platform != "linux":
        return None
    try:
        if "[never]" in _MODE_FILE.read_text():
            return None
        return int(_SIZE_FILE.read_text())
    except (OSError, ValueError):
        return None


def use_huge_pages() -> int:
    """Moves the large private buffers of this process to huge pages. Returns the bytes that were moved.

    Copies what is moved: about 3 ms for each MB on a slow machine, once.
    """
    size = huge_page_bytes()
    if size is None:
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # /proc is not mounted
        return 0
    for start, end in _large_buffers(maps):
        first, last = -(-start // size) * size, end // size * size
        if first >= last or madvise(first, last - first, _MADV_HUGEPAGE) != 0:
            continue
        # One by one: the kernel stops at the first page of the range that was never written to.
        moved += sum(size for page in range(first, last, size) if madvise(page, size, _MADV_COLLAPSE) == 0)
    return moved


def _large_buffers(maps: str) -> Iterator[tuple[int, int]]:
    """Addresses (start, end) of the private anonymous memory in `/proc/self/maps`, where it is large."""
    for line in maps.splitlines():
        if match := _LINE.match(line):
            start, end = int(match[1], 16), int(match[2], 16)
            if end - start >= _LARGE_BYTES:
                yield start, end
