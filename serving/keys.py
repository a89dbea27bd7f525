"""API keys: read from a file, kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from edgellm.errors import ConfigError

KEY_CHARS_MAX = 512
_KEY = re.compile(rf"[\x21-\x7e]{{1,{KEY_CHARS_MAX}}}")
_log = logging.getLogger(__name__)


class ApiKeys:
    """A set of keys; knows their SHA-256 only."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = tuple({_digest(key) for key in keys})

    def __len__(self) -> int:
        return len(self._hashes)

    def accept(self, key: str) -> bool:
        """Whether `key` is one of them. Compares with every one, so that time tells nothing."""
        given, found = _digest(key), False
        for known in self._hashes:
            found |= hmac.compare_digest(given, known)
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def load_api_keys(path: Path) -> ApiKeys:
    """The keys in a file, one a line; empty lines and lines that start with # do not count.

    Raises ConfigError if the file cannot be read, has no key, or a line that cannot be one. Warns if others than the
    file's owner can read it.
    """
    try:
        text = path.read_text("utf-8")
        mode = path.stat().st_mode
    except UnicodeDecodeError:
        raise ConfigError(f"api_key_file {path}: not a text file") from None
    except OSError as error:
        raise ConfigError(f"api_key_file {path}: {error.strerror or error}") from None
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        _log.warning("api_key_file %s can be read by other users; chmod 600 it", path)
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not _KEY.fullmatch(key):
            raise ConfigError(
                f"api_key_file {path}: line {number} is not a key (printable ASCII without spaces, "
                f"at most {KEY_CHARS_MAX} characters)"
            )
        keys.append(key)
    if not keys:
        raise ConfigError(f"api_key_file {path}: has no key")
    return ApiKeys(keys)
