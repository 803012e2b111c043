"""Charts of benchmarks: `KIND(frame, *, ax=None, ...) -> Axes`, drawn with matplotlib's object API alone.

`frame` is a `Runs`, its `requests` or its `summary`, or a filtered part of them; a chart that needs single requests
says so when it gets a summary. Without `ax` a new figure is made, which shows itself in a notebook with an alternative
text. Nothing here uses pyplot or changes rcParams.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from miinb.bench.charts.bars import cost, latency, memory, throughput, time_split
from miinb.bench.charts.curves import ecdf, frontier
from miinb.bench.charts.frames import summary_of
from miinb.bench.charts.pictures import images
from miinb.bench.charts.scaling import batch_scaling, parallel_scaling
from miinb.bench.charts.steps import waterfall
from miinb.bench.charts.style import alt_text, png, save, svg
from miinb.bench.charts.tradeoff import quality
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
    "quality": quality,
    "images": images,
}


def draw(kind: str, frame: Any, **options: Any) -> Any:
    """The chart of that name; options as its function has them.

    Raises:
        InvalidValue: there is no chart of that name, it has no such option, or the frame lacks what it draws.
    """
    if kind not in KINDS:
        raise InvalidValue(f"There is no chart {kind!r}.", hint=did_you_mean(kind, KINDS))
    for name in options:
        if having := [other for other in KINDS if name in options_of(other)]:
            if kind not in having:
                raise InvalidValue(f"charts.{kind} has no {name}.", hint=f"{', '.join(having)} have it.")
        else:
            hint = did_you_mean(name, options_of(kind))
            raise InvalidValue(f"charts.{kind}: there is no option {name!r}.", hint=hint)
    return KINDS[kind](frame, **options)


def options_of(kind: str) -> tuple[str, ...]:
    """The options of a chart: "metric", "by", "log", ..."""
    return tuple(inspect.signature(KINDS[kind]).parameters)[1:]


def fitting(frame: Any) -> str:
    """The chart that shows most of these runs at a glance: quality, the frontier of several loads, else the latencies.

    Raises:
        InvalidValue: nothing was measured.
    """
    summary = summary_of(frame, "fitting")
    if summary["img_s"].notna().any():
        return "images"
    if summary["perplexity_change"].notna().any():
        return "quality"
    loads = summary[["concurrency", "rate_rps"]].drop_duplicates()
    return "frontier" if len(loads) > 1 else "latency"


__all__ = [*KINDS, "KINDS", "alt_text", "draw", "fitting", "options_of", "png", "save", "svg"]
