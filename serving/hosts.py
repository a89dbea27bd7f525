"""Which Host and Origin headers are ours: parsing and comparing, no HTTP."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+(?:%[0-9a-z._~-]+)?\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", re.ASCII)
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def split_authority(text: str) -> tuple[str, str] | None:
    """Host and port of a Host header: lower case, no brackets, no last dot; port "" if none. None if malformed."""
    match = _AUTHORITY.fullmatch(text.strip().lower())
    if match is None:
        return None
    host = match[1].strip("[]").rstrip(".")
    if ":" in host and _address(host) is None:
        return None
    return (host, match[2] or "") if host else None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class HostRule:
    """Which hosts a request may name.

    Always: localhost and names under .localhost, loopback addresses, the address listened on. Also the `allowed`
    ones: a name, `*.example.com` for the names under it, or `*` for all. Where the server listens on every address
    (0.0.0.0 or ::), any literal address: rebinding attacks need a name, since an address cannot change its meaning.
    """

    def __init__(self, bind_host: str, allowed: Iterable[str] = ()) -> None:
        own = [*allowed, f"[{bind_host}]" if ":" in bind_host and not bind_host.startswith("[") else bind_host]
        plain = [name.strip().lower() for name in own]
        self._all = "*" in plain
        self._suffixes = tuple(name[1:] for name in plain if name.startswith("*."))
        parsed = [split_authority(name) for name in plain if "*" not in name]
        self._names = frozenset(pair[0] for pair in parsed if pair is not None)
        address = _address(bind_host.strip("[]"))
        self._any_address = bind_host == "" or (address is not None and address.is_unspecified)

    def accepts(self, header: str) -> bool:
        """Whether a Host header names this server. The port does not matter."""
        pair = split_authority(header)
        if pair is None:
            return False
        host = pair[0]
        if self._all or host in self._names or host == "localhost" or host.endswith(".localhost"):
            return True
        if self._suffixes and host.endswith(self._suffixes):
            return True
        address = _address(host)
        return address is not None and (address.is_loopback or self._any_address)


def same_origin(origin: str, host_header: str) -> bool:
    """Whether an Origin header names the very host and port of the Host header: a page that we served ourselves."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    default = _DEFAULT_PORTS.get(parts.scheme)
    theirs, ours = split_authority(parts.netloc), split_authority(host_header)
    if default is None or theirs is None or ours is None:
        return False
    return (theirs[0], theirs[1] or default) == (ours[0], ours[1] or default)
