"""The processes of a deployment, all watched in the supervisor's loop: started, found, ended and forgotten here.

When and why, the supervisor decides (`supervisor.py`); what one process is, `process.py` knows.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import time
from collections.abc import Callable, Iterable, Iterator

from miinb.server.process import Process

_POLL_S = 0.01  # while they end


class Children:
    """The frontend and the ranks that live.

    Args:
        selector: the loop's; its data is the function to call.
        ended: called with a child whose process has ended.
        reported: called with a child that has written a report, or closed its pipe.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        *,
        ended: Callable[[Process], None],
        reported: Callable[[Process], None],
    ) -> None:
        self._selector = selector
        self._on_end = ended
        self._on_report = reported
        self._living: list[Process] = []

    def __iter__(self) -> Iterator[Process]:
        return iter([*self._living])

    @property
    def frontend(self) -> Process | None:
        """The frontend; None while it is gone."""
        return next((child for child in self._living if child.replica is None), None)

    def of_replica(self, replica: int | None) -> list[Process]:
        """The ranks of a replica; None: the frontend alone."""
        return [child for child in self._living if child.replica == replica]

    def start(self, child: Process) -> None:
        """Watch a process that was started."""
        self._living.append(child)
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._on_end(child))
        self._selector.register(child.status_fd, selectors.EVENT_READ, lambda: self._on_report(child))

    def unhear(self, child: Process) -> None:
        """It has closed its pipe: no more reports will come."""
        self._unregister(child.status_fd)

    def forget(self, child: Process) -> None:
        """Close what is left of a child; its process group is killed."""
        self._living.remove(child)
        self._unregister(child.pidfd)
        self._unregister(child.status_fd)
        child.close()

    def end(self, children: Iterable[Process], grace_s: float) -> None:
        """SIGTERM, a moment, SIGKILL of the groups; blocks for at most `grace_s`."""
        ending = [*children]
        for child in ending:
            child.signal_group(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and any(child.exit_code is None for child in ending):
            time.sleep(_POLL_S)
        for child in ending:
            self.forget(child)

    def _unregister(self, descriptor: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(descriptor)
