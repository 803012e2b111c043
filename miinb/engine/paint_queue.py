"""Pictures that wait, and which of them are computed next: requests take turns. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

from miinb.engine.painting import Work
from miinb.image_messages import PaintRequest


@dataclass(eq=False, slots=True)
class Row:
    """A picture that waits or is computed."""

    request: PaintRequest
    work: Work
    alone: bool = False  # a batch with it failed: it is tried by itself
    ended: bool = False
    t_start: float = 0.0
    shown: int = 0  # previews so far


class PaintQueue:
    """Pictures that wait, by the request (all pictures of one call of a client) that each belongs to.

    The request whose turn it is says what the next batch computes: its first picture, and pictures that agree with that
    one, a picture of each waiting request in turn, as often as there is room. Then those that had a part in the batch
    stand behind those that had none; a new request stands last. So a request waits for one batch, at most, of each
    request before it, however many pictures these have. Pictures of one request that agree keep their order.
    """

    def __init__(self) -> None:
        self._turns: dict[str, list[Row]] = {}  # by request; it is the first one's turn
        self._served: list[str] = []  # whose pictures the batch has that was taken last, in its order

    def __iter__(self) -> Iterator[Row]:
        return (row for rows in self._turns.values() for row in rows)

    def __len__(self) -> int:
        return sum(map(len, self._turns.values()))

    def add(self, row: Row) -> None:
        """A picture, behind the others of its request."""
        self._turns.setdefault(row.request.request_id, []).append(row)

    def put_back(self, rows: Sequence[Row]) -> None:
        """Pictures of a batch that failed, each to be computed by itself, before the others of its request."""
        for row in reversed(rows):
            row.alone, row.t_start, row.shown = True, 0.0, 0
            self._turns.setdefault(row.request.request_id, []).insert(0, row)

    def remove(self, row: Row) -> None:
        """One that waits is not wanted any more."""
        rows = self._turns[row.request.request_id]
        rows.remove(row)
        if not rows:
            del self._turns[row.request.request_id]

    def take(self, most: Callable[[Work], int], begun: Sequence[Row] = ()) -> list[Row]:
        """The pictures that are computed next, or that join a batch which has begun; they wait no longer.

        Args:
            most: pictures of a batch of this work.
            begun: the batch.
        """
        for request_id in self._served:
            if request_id in self._turns:
                self._turns[request_id] = self._turns.pop(request_id)
        if not begun:
            self._served = []
        if not self._turns:
            return []
        first = begun[0] if begun else next(iter(self))
        if first.alone:
            batch = [] if begun else [first]
        else:
            alike = ([row for row in rows if row.work == first.work and not row.alone] for rows in self._turns.values())
            turns = (row for turn in zip_longest(*alike) for row in turn if row is not None)
            batch = list(islice(turns, max(0, most(first.work) - len(begun))))
        now = time.monotonic()
        for row in batch:
            self.remove(row)
            row.t_start = now
        self._served += [row.request.request_id for row in batch]
        return batch
