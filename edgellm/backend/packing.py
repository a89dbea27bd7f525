"""Packed weights: edgellm's own matrix multiplication inside llama.cpp's CPU backend.

llama.cpp multiplies several of the common weight formats a row at a time. `edgellm._kernels` (kernels/packed.h)
rearranges them when a model is loaded and multiplies sixteen rows at once; docs/benchmarks.md has the figures. With
a llama.cpp that is not the expected one (host.py), or on a processor without the instructions, nothing is packed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator

from edgellm import _kernels
from edgellm.backend.host import UnknownLibraryError, connect_host

INSTALLING = threading.RLock()
"""Held while something is hooked into llama.cpp, or asked whether it is: models are loaded on several threads."""

_log = logging.getLogger(__name__)


def packing_kernels() -> str | None:
    """The name of the kernels that packed weights will be multiplied with; None where weights are not packed.

    The first call, which must come before the first model is loaded, installs them. From any thread.
    """
    with INSTALLING:
        return _installed()


@functools.cache
def _installed() -> str | None:
    if not (available := _kernels.kernels()):
        _log.info("weights are not packed: this processor has no instructions for it")
        return None
    try:
        connect_host()
    except UnknownLibraryError as error:
        _log.warning("weights are not packed: llama.cpp is not the library that was expected (%s)", error)
        return None
    _kernels.install_packing(available[0])
    return available[0]


def packable_types() -> frozenset[str]:
    """Tensor types that will be packed, as GGUF files name them: "Q4_K"; none where weights are not packed."""
    return frozenset(_kernels.types()) if packing_kernels() else frozenset()


@contextlib.contextmanager
def packing(on: bool) -> Iterator[None]:
    """While this is entered, models that this thread loads are packed, or not."""
    if packing_kernels() is None:
        yield
        return
    _kernels.set_packing(on)
    try:
        yield
    finally:
        _kernels.set_packing(False)
