"""Work on arrays shared out to threads, for native code that lets go of the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def in_shares(work: Callable[[slice], None], count: int, threads: int, unit: int = 1) -> None:
    """Calls `work` for parts of range(count), one a thread, this one included; parts begin at multiples of `unit`.

    Raises what `work` raises.
    """
    units = -(-count // unit)
    share = -(-units // max(1, threads)) * unit
    parts = [slice(start, min(start + share, count)) for start in range(0, count, max(1, share))]
    waiting = [_pool(threads).submit(work, part) for part in parts[1:]]
    for part in parts[:1]:
        work(part)
    for job in waiting:
        job.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="edgellm-share")
