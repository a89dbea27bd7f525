"""What the training process does to itself; each in a process of its own, for it cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's limits are Linux's")


def said(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@linux
def test_memory_over_the_budget_is_noticed() -> None:
    code = """
from edgellm.tune.own_process import MemoryWatch, private_bytes
watch = MemoryWatch(private_bytes() + (64 << 20))
data = bytearray(16 << 20)
assert watch.take_peak() >= 16 << 20
more = bytes(b"x" * (100 << 20))
try:
    watch.take_peak()
except MemoryError as error:
    print(error)
"""
    assert "more than the budget" in said(code)


@linux
def test_memory_far_over_the_budget_is_refused_by_the_kernel() -> None:
    code = """
from edgellm.tune.own_process import MemoryWatch
watch = MemoryWatch(256 << 20)
try:
    data = bytearray(2 << 30)
except MemoryError:
    print("refused")
"""
    assert said(code) == "refused"


def test_without_a_budget_nothing_is_refused() -> None:
    code = """
from edgellm.tune.own_process import MemoryWatch
watch = MemoryWatch(None)
data = bytearray(1 << 30)
watch.take_peak()
watch.close()
print(len(data))
"""
    assert said(code) == str(1 << 30)


@linux
def test_whatever_else_runs_comes_first() -> None:
    code = """
import os
from pathlib import Path
from edgellm.tune.own_process import step_back
step_back()
print(os.nice(0), Path("/proc/self/oom_score_adj").read_text().strip(), os.sched_getscheduler(0) == os.SCHED_BATCH)
"""
    assert said(code) == "19 1000 True"


@linux
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_what_is_freed_goes_back_to_the_system() -> None:
    code = """
import numpy as np
from edgellm.tune.own_process import private_bytes, thrifty_allocation
for thrifty in (False, True):
    if thrifty:
        thrifty_allocation()
    np.ones(16 << 20, np.uint8)  # after which glibc takes what is smaller from its heap, if nothing was said
    some = [np.ones(4 << 20, np.uint8) for _ in range(50)]
    before = private_bytes()
    del some[::2]  # gaps between those that stay
    print((before - private_bytes()) >> 20)
    del some
"""
    kept, thrifty = map(int, said(code).split())
    assert kept < 20
    assert thrifty >= 95
