"""How often each replica has ended, and which ones are given up."""

from __future__ import annotations

import time

#: So many restarts in a row a replica gets; one that has served for a while begins anew.
MAX_RESTARTS = 3
STEADY_S = 60.0


class Restarts:
    """Books of the replicas' ends; None stands for the frontend, whose end takes all with it.

    Attributes:
        given_up: replicas that are not started again, by themselves: the others serve on.
    """

    def __init__(self) -> None:
        self.given_up: set[int] = set()
        self._counts: dict[int | None, int] = {}
        self._ready_at: dict[int | None, float] = {}

    def ready(self, replica: int | None) -> None:
        """It serves."""
        self._ready_at.setdefault(replica, time.monotonic())

    def count(self, replica: int | None) -> int | None:
        """It has ended: which restart in a row this is, or None: it has had all."""
        began = self._ready_at.pop(replica, None)
        if began is not None and time.monotonic() - began >= STEADY_S:
            self._counts.pop(replica, None)
        self._counts[replica] = number = self._counts.get(replica, 0) + 1
        return number if number <= MAX_RESTARTS else None

    def begin_anew(self) -> None:
        """All are asked to start anew: what was before does not count."""
        self.given_up.clear()
        self._counts.clear()
        self._ready_at.clear()
