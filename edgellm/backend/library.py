"""Loads llama.cpp once, checks that it is the version this code was written for, and routes its log."""

from __future__ import annotations

import collections
import functools
import logging
import os
import threading
from typing import Any

from edgellm.errors import BackendError

EXPECTED_VERSION = "0.3.36"
_SPIN_COUNT = "2000"

_log = logging.getLogger("edgellm.llama")
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}  # info is chatter: debug
_CONTINUE = 5

_recent_errors: collections.deque[str] = collections.deque(maxlen=8)
_state = threading.local()


def _on_log(level: int, text: bytes | None, _user_data: Any) -> None:
    message = (text or b"").decode("utf-8", "replace").rstrip()
    if level == _CONTINUE:
        level = getattr(_state, "level", 1)
    _state.level = level
    if not message:
        return
    if level >= 3:
        _recent_errors.append(message)
    # llama.cpp reports an ordinary refusal at error level; the exception that follows carries it, so it is not shouted.
    _log.log(min(_LEVELS.get(level, logging.DEBUG), logging.INFO if level >= 4 else logging.DEBUG), "%s", message)


@functools.cache
def lib() -> Any:
    """The llama_cpp low-level module, loaded, checked and initialised.

    Raises BackendError when the installed llama-cpp-python is another version, or lacks a function that is relied on.
    """
    # How long GNU OpenMP's threads spin for each other before they sleep; read when the library is loaded. By default
    # they spin for milliseconds, and a neighbour that takes one core then makes every operation wait for a whole turn
    # of the scheduler. docs/benchmarks.md has the figures.
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    import llama_cpp
    from llama_cpp import llama_cpp as low

    if llama_cpp.__version__ != EXPECTED_VERSION:
        raise BackendError(
            f"llama-cpp-python {llama_cpp.__version__} is installed, but edgellm needs exactly {EXPECTED_VERSION}: "
            f"pip install llama-cpp-python=={EXPECTED_VERSION}"
        )
    missing = [name for name in _RELIED_ON if not hasattr(low, name)]
    if missing:
        raise BackendError(
            f"llama-cpp-python {EXPECTED_VERSION} lacks {', '.join(missing)}; it may be damaged: reinstall it"
        )
    low.edgellm_log_callback = low.llama_log_callback(_on_log)  # kept alive with the module
    low.llama_log_set(low.edgellm_log_callback, None)
    low.llama_backend_init()
    return low


_RELIED_ON = (
    "llama_model_load_from_file",
    "llama_init_from_model",
    "llama_decode",
    "llama_get_logits_ith",
    "llama_memory_seq_rm",
    "llama_memory_seq_cp",
    "llama_set_adapters_lora",
    "llama_sampler_sample",
    "llama_sampler_init_grammar_lazy_patterns",
)


def take_errors() -> str:
    """What llama.cpp said at warning level or above since the last call, newest last; for error messages."""
    lines = list(_recent_errors)
    _recent_errors.clear()
    return "; ".join(lines[-3:])
