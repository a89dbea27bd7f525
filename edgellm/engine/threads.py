"""How many threads to compute with."""

from __future__ import annotations

import os
from pathlib import Path


def default_threads(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Physical cores this process may use: a second hardware thread of a core only slows llama.cpp down."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # macOS
        return max(1, (os.cpu_count() or 2) // 2)
    cores = set()
    for cpu in allowed:
        try:
            cores.add((cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
