"""The requests table of a client, or of a session through its restarts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from miinb.results import frame_of

if TYPE_CHECKING:
    import pandas

MAX_ROWS = 100_000  # more push out the oldest


class RequestLog:
    """One row for each request, in the order of their ends. Thread-safe."""

    def __init__(self) -> None:
        self._rows: deque[dict[str, Any]] = deque(maxlen=MAX_ROWS)
        self._lock = threading.Lock()

    def add(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as it is kept: with its number, `seq`."""
        with self._lock:
            kept = {"seq": self._rows[-1]["seq"] + 1 if self._rows else 0, **row}
            self._rows.append(kept)
        return kept

    @property
    def frame(self) -> pandas.DataFrame:
        """The rows, with the columns of a benchmark's."""
        with self._lock:
            rows = tuple(self._rows)
        return frame_of(rows)
