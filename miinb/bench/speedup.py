"""How many times as fast, and how sure that is: ratios of medians with bootstrap intervals over blocks of requests.

Requests that run together share their luck, so blocks of consecutive ones are drawn as wholes (Künsch, 1989).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from miinb.bench.records import NAN

RESAMPLES = 2000
#: Fewer blocks a side say nothing: of a closed loop, and of arrivals, whose queue remembers for longer.
FEWEST_BLOCKS = 3
FEWEST_BLOCKS_OF_ARRIVALS = 8
#: Times of requests in flight after which a queue's have little to do with each other any more.
MEMORY = 5

Times = np.ndarray[Any, np.dtype[np.float64]]


def speedup(slow: pd.DataFrame, fast: pd.DataFrame, *, concurrency: float, rate: float) -> tuple[float, float, float]:
    """How many times as fast some requests were as others at the same load, with a 95 % interval (NaN: unknown).

    Args:
        slow: measured rows of the reference, one load.
        fast: of the other arm.
        concurrency: requests in flight; NaN for arrivals.
        rate: arrivals a second; NaN for a closed loop. Near saturation a run is too short for an interval.
    """
    sides = [_passes(rows) for rows in (slow, fast)]
    if math.isnan(rate):
        return ratio_of_medians(*sides, block=1 if math.isnan(concurrency) else int(concurrency))
    counts = [len(times) for side in sides for times in side]
    if not counts:
        return NAN, NAN, NAN
    in_flight = max(rate * float(np.mean(times)) for side in sides for times in side)
    block = max(math.ceil(math.sqrt(max(counts))), math.ceil(MEMORY * in_flight))
    return ratio_of_medians(*sides, block=block, fewest=FEWEST_BLOCKS_OF_ARRIVALS)


def _passes(rows: pd.DataFrame) -> list[Times]:
    """End-to-end seconds of each pass, in the order of the requests."""
    passes = [part.sort_values("seq")["e2e_s"].dropna() for _, part in rows.groupby("pass_no", dropna=False)]
    return [times.to_numpy(dtype=np.float64) for times in passes if len(times)]


def ratio_of_medians(
    slow: Sequence[Times], fast: Sequence[Times], *, block: int = 1, fewest: int = FEWEST_BLOCKS, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of two sides' medians with its 95 % percentile-bootstrap interval.

    Args:
        slow: seconds, one array for each pass; a side's value is the median of its passes' medians.
        fast: of the other side.
        block: consecutive requests that are drawn as one.
        fewest: with fewer blocks in a side the interval is NaN.
        seed: of the draws.
    """
    if not slow or not fast:
        return NAN, NAN, NAN
    values = [float(np.median([np.median(times) for times in side])) for side in (slow, fast)]
    if not values[1] > 0:
        return NAN, NAN, NAN
    ratio = values[0] / values[1]
    if any(len(times) < block for side in (slow, fast) for times in side):
        return ratio, NAN, NAN
    if min(sum(len(times) // block for times in side) for side in (slow, fast)) < fewest:
        return ratio, NAN, NAN
    rng = np.random.default_rng(seed)
    draws = [np.median([_drawn(times, block, rng) for times in side], axis=0) for side in (slow, fast)]
    low, high = np.percentile(draws[0] / draws[1], [2.5, 97.5])
    return ratio, float(low), float(high)


def _drawn(times: Times, block: int, rng: np.random.Generator) -> Times:
    """Medians of resampled blocks."""
    blocks = times[: len(times) // block * block].reshape(-1, block)
    picks = rng.integers(len(blocks), size=(RESAMPLES, len(blocks)))
    found: Times = np.median(blocks[picks].reshape(RESAMPLES, -1), axis=1)
    return found
