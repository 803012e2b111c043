"""What the death of a rank costs: streams on every replica, `kill -9` of one, and how long until it is back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miinb import hardware
from miinb.errors import MiinbError
from miinb.wording import size_words

if TYPE_CHECKING:
    from miinb.messages import Status
    from miinb.session import Session

#: Seconds after which nobody waits any longer for it.
LIMIT_S = 180.0


@dataclass(frozen=True, slots=True)
class Death:
    """What happened.

    Attributes:
        complete: streams that ended with all their tokens.
        failures: the others' errors, and how many had each.
        back_s: from the kill until all replicas were ready; infinity: not within `LIMIT_S`.
        left_bytes: GPU memory that was free before the start and is not after `stop`; 0 without a GPU.
        used_bytes: GPU memory that the deployment had when the streams began.
    """

    complete: int
    failures: dict[str, int]
    back_s: float
    left_bytes: int
    used_bytes: int

    @property
    def wrong(self) -> str:
        """What is not as it must be, if anything."""
        return "" if self.back_s < LIMIT_S else "The replica did not come back."

    def words(self) -> Iterator[str]:
        """In words."""
        failed = "; ".join(f"{count} failed: {error}" for error, count in self.failures.items()) or "none failed"
        yield f"{self.complete} streams complete, {failed}"
        back = f"was not back after {LIMIT_S:.0f} s" if self.wrong else f"was back after {self.back_s:.1f} s"
        yield f"the replica {back}"
        yield f"after stop {size_words(self.left_bytes)} of {size_words(self.used_bytes)} of GPU memory are not free"


def kill_one(session: Session, *, streams: int, new_tokens: int, free_before: int) -> Death:
    """Kill the first rank of the last replica while streams run on all of them; stops the deployment.

    Args:
        session: of two replicas or more.
        streams: requests that run when it dies, spread over the replicas.
        new_tokens: of each; enough that none is complete by then.
        free_before: `free_bytes()` before the deployment was started.

    Raises:
        MiinbError: it was no longer serving when all was over.
    """
    used = free_before - free_bytes()
    running = [session.stream(f"Story {i}:", max_new_tokens=new_tokens, ignore_eos=True) for i in range(streams)]
    for stream in running:
        next(stream)
    before = session.status()
    last = max(rank.replica for rank in before.ranks)
    victim = next(rank for rank in before.ranks if rank.replica == last)
    os.kill(victim.pid, signal.SIGKILL)
    killed_at = time.monotonic()
    ends: list[str] = []
    readers = [
        threading.Thread(target=lambda stream=stream: ends.append(_end(stream, new_tokens))) for stream in running
    ]
    for reader in readers:
        reader.start()
    back_s = _until_back(session, before, victim.pid, killed_at)
    for reader in readers:
        reader.join()
    session.generate("Still there?", max_new_tokens=4, ignore_eos=True)
    session.stop()
    failures = Counter(end for end in ends if end)
    return Death(ends.count(""), dict(failures), back_s, max(0, free_before - free_bytes()), used)


def _end(stream: Any, new_tokens: int) -> str:
    """How a stream ended: "" for well, or its error."""
    try:
        tokens = len(stream.result.token_ids[0])
    except MiinbError as error:
        return f"{type(error).__name__}: {error.message}"
    return "" if tokens == new_tokens else f"only {tokens} of {new_tokens} tokens came"


def _until_back(session: Session, before: Status, pid: int, killed_at: float) -> float:
    while (waited := time.monotonic() - killed_at) < LIMIT_S:
        now = session.status()
        pids = {rank.pid for rank in now.ranks}
        if now.state == "ready" and len(pids) == len(before.ranks) and pid not in pids:
            return waited
        time.sleep(0.1)
    return float("inf")


def free_bytes() -> int:
    """Of all GPUs' memory, as the driver says."""
    return sum(gpu.free_bytes for gpu in hardware.detect().gpus)
