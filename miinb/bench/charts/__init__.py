"""Charts of benchmarks: `KIND(frame, *, ax=None) -> Axes`, drawn with matplotlib's object API alone.

`frame` is a `Runs`, its `requests` or its `summary`, or a filtered part of them; a chart that needs single requests
says so when it gets a summary. Without `ax` a new figure is made, which shows itself in a notebook with an alternative
text. Nothing here uses pyplot or changes rcParams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miinb.bench.charts.bars import cost, images, latency, memory, throughput, time_split
from miinb.bench.charts.curves import batch_scaling, ecdf, frontier, parallel_scaling
from miinb.bench.charts.steps import waterfall
from miinb.bench.charts.style import alt_text, png, save, svg
from miinb.errors import InvalidValue, did_you_mean

KINDS: dict[str, Callable[..., Any]] = {
    "latency": latency,
    "throughput": throughput,
    "cost": cost,
    "frontier": frontier,
    "ecdf": ecdf,
    "batch_scaling": batch_scaling,
    "parallel_scaling": parallel_scaling,
    "time_split": time_split,
    "memory": memory,
    "waterfall": waterfall,
    "images": images,
}


def draw(kind: str, frame: Any, **options: Any) -> Any:
    """The chart of that name.

    Raises:
        InvalidValue: there is no chart of that name, or the frame lacks what it draws.
    """
    if kind not in KINDS:
        raise InvalidValue(f"There is no chart {kind!r}.", hint=did_you_mean(kind, KINDS))
    return KINDS[kind](frame, **options)


__all__ = [*KINDS, "KINDS", "alt_text", "draw", "png", "save", "svg"]
