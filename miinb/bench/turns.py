"""The order in which the arms of a benchmark take turns at a point."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from miinb.bench.arms import Arm
from miinb.bench.workload import Endless, Job, Point


@dataclass
class Turn:
    """One block of one arm; `number` -1 is its warm-up."""

    point: Point
    arm: Arm
    jobs: Sequence[Job]
    number: int
    pass_no: int = 0
    queue: Iterator[Job] = field(default_factory=lambda: iter(()))
    t_block: float = 0.0
    ends_at: float = math.inf  # no request begins later
    ended: threading.Event = field(default_factory=threading.Event)  # none begins any more

    @property
    def closed(self) -> bool:
        """A closed loop: the next request begins when one ends. The warm-up is always one."""
        return self.point.rate is None or self.number < 0

    def start(self, now: float, duration_s: float | None) -> None:
        """The clock runs."""
        self.queue, self.t_block = iter(self.jobs), now
        if duration_s is not None and isinstance(self.jobs, Endless):
            self.ends_at = now + duration_s


def turns(point: Point, arms: Sequence[Arm]) -> Iterator[Turn]:
    """Every arm's warm-up, then the blocks; the order of the arms turns around from block to block."""
    if point.warmup:
        for arm in arms:
            yield Turn(point, arm, point.warmup, -1)
    for number, jobs in enumerate(point.blocks):
        for arm in arms if (point.index + number) % 2 == 0 else tuple(reversed(arms)):
            yield Turn(point, arm, jobs, number, point.passes[number])
