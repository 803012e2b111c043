"""Tells a rank that hangs from one that computes for long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil

#: A replica that owes an answer, and whose ranks use no CPU time for so long, is stopped or deadlocked.
IDLE_S = 10.0
#: No step takes so long: a replica that does not answer is ended even if it computes.
MAX_SILENT_S = 900.0
#: CPU seconds that a process may use while it hangs (timers, signals).
NOISE_S = 0.1


class Watchdog:
    """What is known of the replicas that do not answer; one for a supervisor."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}  # by replica: seconds of silence and CPU seconds, as last noted

    def hangs(self, replica: int, silent_s: float, pids: Iterable[int]) -> bool:
        """Whether the replica is to be ended.

        Args:
            replica: its number.
            silent_s: seconds since it was asked for a sign of life that it has not given.
            pids: its ranks.
        """
        cpu_s = sum(map(_cpu_s, pids))
        noted = self._seen.get(replica)
        if noted is None or silent_s < noted[0] or abs(cpu_s - noted[1]) > NOISE_S:
            noted = self._seen[replica] = (silent_s, cpu_s)
        return silent_s - noted[0] >= IDLE_S or silent_s >= MAX_SILENT_S

    def forget(self, replica: int | None) -> None:
        """The replica has ended."""
        if replica is not None:
            self._seen.pop(replica, None)


def _cpu_s(pid: int) -> float:
    with contextlib.suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0
