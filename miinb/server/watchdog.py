"""Tells a process that hangs from one that computes for long."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import psutil

#: A replica that owes an answer, and whose ranks use no CPU time for so long, is stopped or deadlocked.
IDLE_S = 10.0
#: The same for one rank while others compute: it may wait for them for long, but not for so long.
ALONE_S = 60.0
#: No step takes so long: a replica that does not answer is ended even if it computes.
MAX_SILENT_S = 900.0
#: CPU seconds that a process may use while it hangs (timers, signals).
NOISE_S = 0.1
#: Between two looks at whether the frontend has reported.
CHECK_S = 2.0


class Watchdog:
    """What is known of the replicas that do not answer, and of the frontend (None); one for a supervisor."""

    def __init__(self) -> None:
        #: By replica, then process: seconds of silence and CPU seconds when it last used some.
        self._seen: dict[int | None, dict[int, tuple[float, float]]] = {}

    def hangs(self, replica: int | None, silent_s: float, pids: Sequence[int]) -> int | None:
        """Whether the replica is to be ended: the process to blame, or None.

        Args:
            replica: its number; None for the frontend.
            silent_s: seconds since it owes a sign of life.
            pids: its processes, one at least.
        """
        seen = self._seen.setdefault(replica, {})
        idle_s = {}
        for pid in pids:
            cpu_s = _cpu_s(pid)
            noted = seen.get(pid)
            if noted is None or silent_s < noted[0] or abs(cpu_s - noted[1]) > NOISE_S:
                noted = seen[pid] = (silent_s, cpu_s)
            idle_s[pid] = silent_s - noted[0]
        stopped = {pid for pid in pids if _stopped(pid)}
        worst = max(pids, key=lambda pid: (pid in stopped, idle_s[pid]))
        # Others may spin while they wait for one that is stopped, as collectives in shared memory and on GPUs do.
        alone_s = IDLE_S if worst in stopped else ALONE_S
        hangs = min(idle_s.values()) >= IDLE_S or idle_s[worst] >= alone_s or silent_s >= MAX_SILENT_S
        return worst if hangs else None

    def forget(self, replica: int | None) -> None:
        """The replica has ended."""
        self._seen.pop(replica, None)


class Pulse:
    """For how long the frontend, which reports every second, has not.

    Counted in checks of this process's own: time in which the machine slept, or in which this process was stopped
    itself, is no silence of the frontend.

    Attributes:
        silent_s: seconds without a report.
        due: when to check next (`time.monotonic()`).
    """

    def __init__(self, now: float) -> None:
        self.silent_s = 0.0
        self.due = now + CHECK_S

    def heard(self) -> None:
        """It has reported."""
        self.silent_s = 0.0

    def check(self, now: float) -> bool:
        """Whether a check was due and the frontend has missed more than one report before it."""
        if now < self.due:
            return False
        self.due = now + CHECK_S
        self.silent_s += CHECK_S
        return self.silent_s > CHECK_S


def _cpu_s(pid: int) -> float:
    with contextlib.suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


def _stopped(pid: int) -> bool:
    """By SIGSTOP or its like."""
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False
