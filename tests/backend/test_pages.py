"""Huge pages, in a process of its own: what a test run has in memory is not touched."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from edgellm.backend import pages

_LINUX = tuple(map(int, platform.release().split(".")[:2])) if sys.platform == "linux" else (0, 0)
_MAPS = """\
55d0c0000000-55d0c4000000 r-xp 00000000 fe:00 1234                       /usr/bin/python3.11
7f0000000000-7f0002000000 rw-p 00000000 00:00 0
7f0010000000-7f0010100000 rw-p 00000000 00:00 0
7f0020000000-7f0024000000 rw-p 00000000 00:00 0                          [anon:buffer]
7f0030000000-7f0034000000 rw-s 00000000 00:00 0
7f0040000000-7f0044000000 r--p 00000000 fe:00 99                         /models/model.gguf
7f0050000000-7f0054000000 rw-p 00000000 00:01 77                         /dev/zero (deleted)
7ffd00000000-7ffd02000000 rw-p 00000000 00:00 0                          [stack]
"""


def test_only_large_private_memory_that_belongs_to_no_file_is_found() -> None:
    assert list(pages._large_buffers(_MAPS)) == [
        (0x7F0000000000, 0x7F0002000000),
        (0x7F0020000000, 0x7F0024000000),
    ]


def test_where_they_are_switched_off_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    monkeypatch.setattr(pages, "_MODE_FILE", tmp_path / "enabled")
    assert pages.huge_page_bytes() is None
    assert pages.use_huge_pages() == 0


_CODE = """
import mmap, re
from edgellm.backend.pages import use_huge_pages
buffer = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
written = bytes(range(256)) * (32 << 12)
buffer[: len(written)] = written
moved = use_huge_pages()
assert buffer[: len(written)] == written and buffer[len(written):] == bytes(len(buffer) - len(written))
print(moved, use_huge_pages() >= moved)
"""


def test_memory_moves_and_keeps_its_content() -> None:
    size = pages.huge_page_bytes()
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
    moved, again = done.stdout.split()
    if size is None or _LINUX < (6, 1):
        assert int(moved) == 0
        return
    assert 16 << 20 <= int(moved) <= 64 << 20
    assert again == "True"
