"""`python -m edgellm.tune.adaptation`: one adaptation of a drafter, in a process of its own.

Prints what happens, one JSON object a line; the last is {"event": "done"} with the result, {"event": "stopped"} after
SIGTERM or SIGINT, or {"event": "failed"} with status 1. A parent that sets EDGELLM_TUNE_CHILD to 1 may also write
"stop" to its standard input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from edgellm.errors import AdapterError, ConfigError, EdgeLLMError, ModelError, StorageError
from edgellm.tune.adaptation_spec import AdaptationSpec, option
from edgellm.tune.giving_way import GivingWay
from edgellm.tune.own_process import CHILD, step_back, stop_wanted

_CODES: tuple[tuple[type[EdgeLLMError], str], ...] = (
    (StorageError, "disk_full"),
    (ModelError, "model_unsupported"),
    (AdapterError, "adapter_unsound"),
    (ConfigError, "invalid_value"),
)
_HELP = {
    "drafter": "the small model, a GGUF file",
    "target": "the model that wrote the answers, a GGUF file",
    "buffer": "the answers",
    "output": "where the adapter goes, if it drafts better",
    "earlier": "the adapter in use so far, to be trained further",
}


_speaking = threading.Lock()


def _report(event: dict[str, Any]) -> None:
    with _speaking:
        _say(event)


def _say(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _last_words() -> None:
    _speaking.acquire()  # for good: nothing is said behind them
    _say({"event": "stopped"})


def parse(arguments: Sequence[str]) -> AdaptationSpec:
    """An option for each of the fields, `--from` for `earlier`. Raises ConfigError; argparse ends the process."""
    parser = argparse.ArgumentParser(prog="python -m edgellm.tune.adaptation", description=__doc__.split("\n")[0])
    for field in fields(AdaptationSpec):
        flag = option(field.name)
        kinds = {"int": int, "float": float, "str": str}
        text = _HELP.get(field.name, "default: %(default)s")
        if field.type == "bool":
            parser.add_argument(flag, dest=field.name, action="store_true", help=text)
        elif field.name in ("drafter", "target", "buffer", "output"):
            parser.add_argument(flag, dest=field.name, type=Path, required=True, help=text)
        else:
            kind = kinds.get(str(field.type), Path)
            parser.add_argument(flag, dest=field.name, type=kind, default=field.default, help=text)
    return AdaptationSpec(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str]) -> int:
    step_back()
    # Torch brings an OpenMP of its own; its threads must not spin where the server's want the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    way = GivingWay(_last_words)
    if os.environ.get(CHILD) == "1":
        way.when(stop_wanted(sys.stdin))
    try:
        spec = parse(arguments)
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)
        from edgellm.tune.adaptation_run import adapt

        result = adapt(spec, _report, way)
    except EdgeLLMError as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), "server_error")
        _report({"event": "failed", "code": code, "message": str(error)})
        return 1
    way.settle()
    _report({"event": "done", **result.as_dict()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
