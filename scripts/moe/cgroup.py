"""A memory control group of one's own, so that a process may have only so much memory, page cache included."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[str]:
    """The folder of a new group with this limit; "" where none can be made. Needs root, or a delegated subtree."""
    folder, limit_file = (_V1, "memory.limit_in_bytes") if (_V1 / "cgroup.procs").exists() else (_V2, "memory.max")
    group = folder / f"edgellm-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit_file).write_text(str(limit_bytes))
        with contextlib.suppress(OSError):
            (group / "memory.swap.max").write_text("0")
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        yield ""
        return
    try:
        yield str(group)
    finally:
        for _ in range(50):  # its processes leave it when they are gone
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)
