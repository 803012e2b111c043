"""Sweeps: the load doubles until every arm is saturated; where each one was, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from miinb.bench.workload import load_words

#: Throughput that a doubled load has to gain, else the arm is saturated.
GAIN = 0.05
#: Share of the requests that have to meet the objectives, else the load is too much.
MOST = 0.5


@dataclass(frozen=True, slots=True)
class _Seen:
    point: int
    load: float
    throughput: float


class Sweep:
    """Loads for all arms alike, and the saturation of each.

    Args:
        kind: "concurrency" or "rate".
        start: the first load.
        limit: no load is above it.
        arms: their labels.
    """

    def __init__(self, kind: str, start: float, limit: float, arms: Sequence[str]) -> None:
        self.kind, self.start, self.limit = kind, start, limit
        self._good: dict[str, _Seen | None] = dict.fromkeys(arms)  # the last load that was worth it
        self.saturation: dict[str, dict[str, Any]] = {}

    def loads(self) -> Iterator[float]:
        """The loads to measure, one after another; tell `seen` of each arm before the next one."""
        load = self.start
        while load <= self.limit:
            yield load
            if len(self.saturation) == len(self._good):
                return
            load *= 2
        for arm, good in self._good.items():
            if arm not in self.saturation:
                self._stop(arm, good, "limit", f"not saturated at {load_words(self.kind, load / 2)}, the sweep's limit")

    def seen(self, arm: str, point: int, load: float, throughput: float, slo_share: float = math.nan) -> None:
        """What an arm did at a load.

        Args:
            arm: its label.
            point: the load's number.
            load: the load.
            throughput: of any unit that is the same at all loads; NaN when no request succeeded.
            slo_share: share of the requests that met the objectives; NaN without objectives.
        """
        if self.saturation.get(arm, {}).get("why", "throughput") != "throughput":
            return
        good, here = self._good[arm], load_words(self.kind, load)
        known = throughput > 0
        missed = known and slo_share < MOST
        # A load that did not gain may have been bad luck: those that other arms still need show it.
        worth = good is None or throughput >= good.throughput * (1 + GAIN) ** math.log2(load / good.load)
        if known and worth and not missed:
            self._good[arm] = _Seen(point, load, throughput)
            self.saturation.pop(arm, None)
        elif arm in self.saturation:
            return
        elif not known:
            self._stop(arm, good, "failed", f"no request succeeded at {here}")
        elif missed:
            self._stop(arm, good, "slo", f"{slo_share:.0%} of the requests met the objectives at {here}")
        elif good is not None:
            change = f"{throughput / good.throughput - 1:+.1%}".replace("-0.0%", "+0.0%")
            self._stop(arm, good, "throughput", f"throughput {change} at {here}")

    def gone(self, arm: str) -> None:
        """The arm is measured no more: its deployment has ended."""
        good = self._good[arm]
        if arm not in self.saturation:
            after = f" after {load_words(self.kind, good.load)}" if good else ""
            self._stop(arm, good, "gone", f"the deployment was gone{after}")

    def _stop(self, arm: str, good: _Seen | None, why: str, reason: str) -> None:
        self.saturation[arm] = {
            "kind": self.kind,
            "point": None if good is None else good.point,
            "load": None if good is None else good.load,
            "why": why,
            "reason": reason,
        }


def saturation_words(arm: str, found: dict[str, Any]) -> str:
    """One line: "optimized: saturated at concurrency 16 (throughput +2.1% at concurrency 32)"."""
    if found["why"] in ("limit", "gone"):
        return f"{arm}: {found['reason']}"
    if found["load"] is None:
        return f"{arm}: saturated from the first load on ({found['reason']})"
    return f"{arm}: saturated at {load_words(found['kind'], found['load'])} ({found['reason']})"
