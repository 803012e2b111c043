"""How long a process looks for what comes next before it sleeps.

Until a sleeping process runs again, with all that it needs in the processor's caches, a short text would be computed
on a GPU; and on its way a request wakes up three. So they look a little longer, on machines that have the cores.
"""

from __future__ import annotations

import functools
import os

#: Seconds. An answer that takes longer is not waited for faster by this.
SPIN_S = 0.005
#: Client, frontend and rank have one each, and there are others.
SPIN_CORES = 4


def spin_s(device: str) -> float:
    """For how long to look, beside a model on this device ("cuda:0"); 0 where it needs the cores itself."""
    return SPIN_S if device.startswith("cuda") and _cores() >= SPIN_CORES else 0.0


def openmp_waiting(*, crowded: bool) -> dict[str, str]:
    """Environment that says how OpenMP's threads wait for each other, read when it loads; what the user has set holds.

    Spinning without end is right only where every thread has a core of its own: with other load on the machine a token
    took 81 ms instead of 3 (2 threads, 2 busy cores). A short spin bridges the gaps between operators all the same.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return {}
    return {"OMP_WAIT_POLICY": "passive"} if crowded else {"GOMP_SPINCOUNT": "1000"}


@functools.cache
def _cores() -> int:
    return len(os.sched_getaffinity(0))
