"""`python -m edgellm.tune.draft SPEC`: one drafter, made in a process of its own. SPEC is a DraftSpec as JSON.

Prints what happens, one JSON object a line; the last is {"event": "done"}, {"event": "stopped"}, or {"event": "failed"}
with status 1.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from edgellm.errors import EdgeLLMError
from edgellm.tune.own_process import CHILD, step_back, stop_wanted


def _report(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    from edgellm.tune.draft.spec import DraftSpec

    try:
        spec = DraftSpec.parse(arguments[0])
        if spec.low_priority:
            step_back()
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # threads must not spin where the engine's want the cores
        stop = stop_wanted(sys.stdin) if os.environ.get(CHILD) == "1" else threading.Event()
        from edgellm.tune.draft.run import make_drafter

        make_drafter(spec, _report, stop)
    except EdgeLLMError as error:
        _report({"event": "failed", "message": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
