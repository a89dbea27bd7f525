"""Text files that users name: plain or compressed."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from edgellm.errors import ConfigError


def read_text(path: Path) -> str:
    """The text of a file, unpacked if its name ends in .gz. Raises ConfigError."""
    try:
        raw = path.expanduser().read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
