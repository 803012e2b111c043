"""Replicas renewed one after another while the others serve: which one is to leave, and until when."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping


class Rolling:
    """A rolling restart. The supervisor asks the frontend to let `leaving` go, and starts it again when it has ended.

    Attributes:
        leaving: the replica that has been asked to end, or None.
        leave_by: when it is killed (time.monotonic).
        failure: why the last rolling restart ended before all were renewed, in the form of the "failed" line.
    """

    #: Seconds that a replica without requests may take to end.
    END_S = 15.0

    def __init__(self) -> None:
        self.leaving: int | None = None
        self.leave_by: float | None = None
        self.failure: Mapping[str, str] | None = None
        self._drain_s = 0.0
        self._left: list[int] = []
        self._renewing = False

    @property
    def active(self) -> bool:
        """Whether some replica is still to end, to start or to be renewed."""
        return self.leaving is not None or self._renewing or bool(self._left)

    def begin(self, replicas: Iterable[int], drain_s: float) -> None:
        """All of these, each with so many seconds for its requests."""
        self._left, self._drain_s, self.failure = [*replicas], drain_s, None

    def next(self) -> dict[str, float] | None:
        """What the frontend is to be told now that all replicas are ready; None: nothing."""
        self._renewing = False
        if self.leaving is not None or not self._left:
            return None
        self.leaving = self._left.pop(0)
        self.leave_by = time.monotonic() + self._drain_s + self.END_S
        return {"leave": self.leaving, "drain_s": self._drain_s}

    def has_left(self, replica: int | None) -> bool:
        """Whether a process of this replica ended because it was asked to; it is to be started again."""
        if replica is None or replica != self.leaving:
            return False
        self.leaving = self.leave_by = None
        self._renewing = True
        return True

    def stop(self, failure: Mapping[str, str] | None = None) -> None:
        """Everything is new, or a replica has failed: the ones that are left stay as they are."""
        self.failure = failure if self.active else self.failure
        self.leaving = self.leave_by = None
        self._renewing, self._left = False, []
