"""How the kernel starts a supervisor: the process, its environment, its lifeline, and the port it may listen on."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from miinb.errors import StartError

_SUPERVISOR = "miinb.server.supervisor"


def spawn(order: Mapping[str, Any], errors: int, *, persist: bool) -> tuple[subprocess.Popen[bytes], int]:
    """Start a supervisor that the Stop button does not reach.

    Args:
        order: the JSON line that it reads first (`server/owner.py: Order`).
        errors: a descriptor for what it writes before it has its log.
        persist: it has no lifeline.

    Returns:
        The process and the writing end of its lifeline (-1 when it has none).

    Raises:
        StartError: it could not be started.
    """
    reader, lifeline = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _SUPERVISOR],
            stdin=reader,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(),
            start_new_session=True,  # the Stop button signals the kernel's process group
        )
    except OSError as error:
        os.close(lifeline)
        raise StartError(f"The supervisor could not be started: {error}.") from None
    finally:
        os.close(reader)
    try:
        with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(lifeline), "wb") as line:
            line.write(json.dumps(order).encode() + b"\n")
    except BaseException:  # the Stop button: it ends as its line does
        os.close(lifeline)
        raise
    if persist:
        os.close(lifeline)
        lifeline = -1
    return process, lifeline


def environment() -> dict[str, str]:
    """This environment, for processes of the package: its folder is on the path, behind all else."""
    root = str(Path(__file__).parent.parent)
    named = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if root in (*named, *sysconfig.get_paths().values()):
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*named, root])}


def check_port(port: int) -> None:
    """Refuse a TCP port that another process listens on.

    Raises:
        StartError: naming that process where the system tells it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not hold it
        try:
            probe.bind(("127.0.0.1", port))
            return
        except OSError as error:
            reason = error.strerror
    holder = ""
    with contextlib.suppress(psutil.Error):
        pids = [c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid]
        holder = f" by process {pids[0]}" if pids else ""
    raise StartError(f"Port {port} cannot be used: {reason}{holder}.", hint="Use port=0 for a free one.")
