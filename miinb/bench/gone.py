"""Deployments that end while they are measured: when an arm is asked no more."""

from __future__ import annotations

from miinb.bench.records import Record
from miinb.errors import Unavailable

#: Requests in a row that find no deployment, each begun after the first of them had failed.
MOST = 8


class Gone:
    """Watches the requests of all arms. Not locked: its user does that.

    Attributes:
        arms: labels of those that are gone, with their last error.
    """

    def __init__(self) -> None:
        self.arms: dict[str, str] = {}
        self._streaks: dict[str, tuple[float, int]] = {}  # when the first of them failed, and how many came after it

    def seen(self, record: Record) -> bool:
        """Take note of a request that is over; whether its arm is gone."""
        arm, error = record.arm, record.error or ""
        if record.status == "ok":
            self._streaks.pop(arm, None)
        elif record.status == "error" and error.startswith(f"{Unavailable.__name__}:"):
            # Those in flight when a replica ends fail together: they tell nothing of the next one.
            since, count = self._streaks.get(arm, (record.t_rel_s + record.e2e_s, 0))
            count += record.t_rel_s >= since
            self._streaks[arm] = since, count
            if count >= MOST:
                self.arms[arm] = error
        return arm in self.arms

    def words(self, failed: int, done: int) -> list[str]:
        """A line for each arm that is gone; the last one says how many of all requests have failed."""
        said = f"ended early, {MOST} requests in a row found no deployment"
        lines = [f"{arm}: {said} ({error})" for arm, error in self.arms.items()]
        return lines + [f"{failed} of {done} requests failed"] * (failed > 0)
