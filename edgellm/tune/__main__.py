"""`python -m edgellm.tune SPEC`: one fine-tuning run in a process of its own. SPEC is a RunSpec as JSON.

Prints what happens, one JSON object a line; the last is {"event": "done"}, {"event": "stopped"}, or {"event": "failed"}
with status 1.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from edgellm.errors import (
    BaseChangedError,
    ConfigError,
    EdgeLLMError,
    ModelError,
    StorageError,
    TrainingDataError,
)
from edgellm.tune.own_process import CHILD, step_back, stop_wanted

_CODES: tuple[tuple[type[EdgeLLMError], str], ...] = (
    (TrainingDataError, "invalid_training_file"),
    (BaseChangedError, "model_changed"),
    (StorageError, "disk_full"),
    (ModelError, "model_unsupported"),
    (ConfigError, "invalid_value"),
)
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")  # torch's words, in a RuntimeError


def _report(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _failure(error: EdgeLLMError) -> dict[str, Any]:
    code = next((code for kind, code in _CODES if isinstance(error, kind)), "server_error")
    event: dict[str, Any] = {"event": "failed", "code": code, "message": str(error)}
    if isinstance(error, TrainingDataError):
        event |= {"param": error.param, "faults": error.faults}
    return event


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def main(arguments: list[str]) -> int:
    step_back()
    # Torch brings an OpenMP of its own; its threads must not spin where the server's want the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    stop = stop_wanted(sys.stdin) if os.environ.get(CHILD) == "1" else threading.Event()
    try:
        from edgellm.tune.run import run
        from edgellm.tune.spec import RunSpec

        run(RunSpec.parse(arguments[0]), _report, stop)
    except EdgeLLMError as error:
        _report(_failure(error))
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        message = "there is not enough memory; a smaller memory_budget_bytes makes it choose a thriftier scheme"
        _report({"event": "failed", "code": "out_of_memory", "message": message})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
