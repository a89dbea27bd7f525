"""`python -m edgellm.tune SPEC`: one fine-tuning run in a process of its own. SPEC is a RunSpec as JSON.

Prints what happens, one JSON object a line; the last is {"event": "done"} or {"event": "failed"}, with status 1.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from edgellm.errors import EdgeLLMError


def _report(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    # Torch brings an OpenMP of its own; its threads must not spin where the server's want the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        from edgellm.tune.run import RunSpec, run

        given = json.loads(arguments[0])
        if "targets" in given:
            given["targets"] = tuple(given["targets"])
        run(RunSpec(**given), _report)
    except EdgeLLMError as error:
        _report({"event": "failed", "message": str(error)})
        return 1
    except MemoryError:
        _report({"event": "failed", "message": "there is not enough memory"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
