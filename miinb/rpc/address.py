"""gRPC's addresses of unix sockets: URIs, whose paths gRPC percent-decodes (a deployment's folder may hold a %2F)."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote

_SCHEME = "unix:"


def unix_address(path: Path) -> str:
    """The address of a socket."""
    return _SCHEME + quote(str(path))


def socket_path(address: str) -> Path | None:
    """The socket of an address; None for TCP."""
    return Path(unquote(address.removeprefix(_SCHEME))) if address.startswith(_SCHEME) else None


def file_at(socket: Path | None) -> tuple[int, int] | None:
    """What tells the socket that is there from an earlier one at the same path; None where there is none."""
    if socket is None:
        return None
    try:
        found = socket.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns
