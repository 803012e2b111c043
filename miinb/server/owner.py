"""The kernel that a deployment belongs to: what it orders, what it is told, and how its end is noticed."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from miinb.messages import from_dict


@dataclass(frozen=True, slots=True)
class Order:
    """The JSON line on stdin.

    Attributes:
        plan: what was chosen before the start (a `Plan`; {} is none): rank 0 goes on from it.
        modules: names the programs of the children: tests put others in their place.
    """

    config: Mapping[str, Any]
    name: str
    folder: str
    kernel_pid: int
    task: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)


def read_order() -> Order:
    """The JSON line on stdin, which is a lifeline from then on: nothing else comes."""
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            raise SystemExit("supervisor: stdin ended before its JSON line")
        line += piece
    return from_dict(Order, json.loads(line))


def tell(line: Mapping[str, Any]) -> None:
    """One JSON line to the kernel, which may be gone, or may not read: then it is lost."""
    with contextlib.suppress(OSError):
        os.set_blocking(1, False)
        os.write(1, json.dumps(line).encode() + b"\n")


class Owner:
    """Watches the kernel's process and its end of the lifeline (stdin), inside the supervisor's loop.

    Args:
        selector: the loop's; its data is the function to call.
        kernel_pid: the kernel's process.
        gone: called when the kernel has ended or closed the lifeline.
    """

    def __init__(self, selector: selectors.BaseSelector, kernel_pid: int, gone: Callable[[], None]) -> None:
        self._selector = selector
        self._gone = gone
        self._watched: list[int] = []
        try:
            pidfd = os.pidfd_open(kernel_pid)
        except ProcessLookupError:
            gone()
            return
        self._watched = [pidfd, sys.stdin.fileno()]
        selector.register(pidfd, selectors.EVENT_READ, gone)
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._lifeline)

    def _lifeline(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            self._gone()

    def release(self) -> None:
        """The deployment belongs to nobody now, and outlives the kernel."""
        for descriptor in self._watched:
            self._selector.unregister(descriptor)
        self._watched = []
