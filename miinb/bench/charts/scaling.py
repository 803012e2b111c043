"""Charts of scaling: throughput over the load, and over the number of devices."""

from __future__ import annotations

from typing import Any

import pandas as pd

from miinb.bench.charts import frames
from miinb.bench.charts.lines import (
    finished,
    height_for,
    hidden_value,
    in_points,
    kept_apart,
    legend,
    legend_name,
    lines_of,
    points_size,
)
from miinb.bench.charts.measures import RATES, rate_of
from miinb.bench.charts.style import INK, near_ticks, new_axes, plain_numbers
from miinb.errors import InvalidValue, did_you_mean
from miinb.wording import number

#: Width of a letter of a label, points.
_LETTER = 5.0
#: What throughput can scale with: the axis of each.
LOADS = {
    "concurrency": "Requests in flight",
    "batch_size": "Batch size",
    "rate_rps": "Arrivals per second",
}
DEVICES = {
    "devices": "Devices (tensor_parallel x replicas)",
    "tp": "Devices of a copy (tensor_parallel)",
    "replicas": "Copies of the model (replicas)",
    "n_gpus": "GPUs",
}


def batch_scaling(
    frame: Any, *, ax: Any = None, metric: str | None = None, by: str | None = None, log: bool = True
) -> Any:
    """Throughput over the number of requests in flight (or the batch size), with the ideal line.

    Args:
        frame: runs, requests or a summary.
        ax: axes to draw on; None makes a figure.
        metric: the rate, as for `throughput`.
        by: what it scales with: "concurrency", "batch_size" or "rate_rps"; None: what varies.
        log: both axes are logarithmic.

    Raises:
        InvalidValue: there is one load only, or no such metric or load.
    """
    rows = frames.summary_of(frame, "batch_scaling")
    _check(by, LOADS)
    by = by or next((name for name in ("batch_size", "concurrency", "rate_rps") if rows[name].nunique() > 1), "")
    if not by or rows[by].nunique() < 2:
        hint = "bench(..., concurrency=[1, 4, 16])" if by in ("", "concurrency") else f"Measure several of {by}."
        raise InvalidValue("charts.batch_scaling: there is one load only.", hint=hint)
    title = "Scaling with the batch size" if by == "batch_size" else "Scaling with concurrent requests"
    title = "Scaling with arrivals" if by == "rate_rps" else title
    return _scaling(rows[rows[by].notna()], by, LOADS[by], rate_of(rows, metric), title, ax, log)


def parallel_scaling(
    frame: Any, *, ax: Any = None, metric: str | None = None, by: str | None = None, log: bool = True
) -> Any:
    """Throughput over the number of devices (tensor_parallel x replicas), with the ideal line.

    Arms of one engine that differ in nothing but their devices are one line.

    Args:
        frame: runs, requests or a summary.
        ax: axes to draw on; None makes a figure.
        metric: the rate, as for `throughput`.
        by: what it scales with: "devices", "tp", "replicas" or "n_gpus"; None: the devices.
        log: both axes are logarithmic.

    Raises:
        InvalidValue: all runs have the same number, or there is no such metric or number.
    """
    rows = frames.summary_of(frame, "parallel_scaling").copy()
    _check(by, DEVICES)
    by = by or "devices"
    rows["devices"] = rows["tp"].astype(float) * rows["replicas"].astype(float)
    if rows[by].nunique() < 2:
        same = "tensor_parallel and replicas" if by == "devices" else by
        raise InvalidValue(
            f"charts.parallel_scaling: all runs have the same {same}.",
            hint="Add the runs of sessions with other numbers: runs_1 + runs_2.",
        )
    return _scaling(_joined(rows, by), by, DEVICES[by], rate_of(rows, metric), "Scaling with devices", ax, log)


def _joined(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """Rows whose arms are engines, where each arm is one point of a line of its engine."""
    if (rows.groupby("arm")[by].nunique() > 1).any() or (rows.groupby("engine")["dtype"].nunique() > 1).any():
        return rows
    joined = rows.assign(arm=rows["engine"])
    same = ["model", "arm", "concurrency", "rate_rps", by]
    return rows if joined.duplicated(same).any() else joined


def _check(by: str | None, known: dict[str, str]) -> None:
    if by is not None and by not in known:
        near = did_you_mean(by, known)
        raise InvalidValue(f"by: throughput does not scale with {by!r} here.", hint=near or f"Use {', '.join(known)}.")


def _scaling(rows: pd.DataFrame, by: str, words: str, rate: str, title: str, ax: Any, log: bool) -> Any:
    """Lines of a rate over `by`; from each line's first point its ideal one, dotted."""
    rows = frames.require(rows, [rate], "scaling", "No answers came.", RATES[rate].axis.lower())
    lines = list(lines_of(rows, by))
    ax = new_axes(ax, height_for([name for name, _, _ in lines], 4.6))
    begins, ends = [], []
    for name, style, line in lines:
        x, y = line[by].to_numpy(dtype=float), line[rate].to_numpy(dtype=float)
        ax.plot(x, y, label=legend_name(name), **style)
        ax.plot(x, y[0] * x / x[0], color=style["color"], linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        gain, ideal = y[-1] / y[0], x[-1] / x[0]
        scaled = f" ({_factor(gain)} of {_factor(ideal)})" if len(line) > 1 else ""
        if len(line) > 1:
            begins.append((x[0], y[0], number(y[0]), style["color"]))
        ends.append((x[-1], y[-1], f"{number(y[-1])}{scaled}", style["color"]))
        to = f" to {number(y[-1])}" if len(line) > 1 else ""
        told = f", {scaled.strip(' ()')}" if scaled else ""
        hidden_value(ax, f"{name}: {number(y[0])}{to} {RATES[rate].unit}{told}")
    ticks = sorted(set(rows[by]))
    if log:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xlim(*_log_limits(ticks, [_room(ax, begins), _room(ax, ends)]))
    else:
        ax.set_xlim(0, ticks[-1] * 1.4)
        ax.set_ylim(0)
    ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
    ax.minorticks_off()
    if log:
        near_ticks(ax.yaxis)
    plain_numbers(ax.yaxis)
    ax.grid(True, color="#eeeeee", linewidth=0.7)
    axis = " (log axis)" * log
    ax.set_xlabel(f"{words}{axis}", fontsize=9, color=INK)
    ax.set_ylabel(f"{RATES[rate].axis}{axis}", fontsize=9, color=INK)
    if log:  # elsewhere they may be at the axis
        _label(ax, begins, -7, "right")
    _label(ax, ends, 7, "left")
    legend(ax)
    return finished(ax, rows, title, "Dotted: ideal scaling from each line's first point")


def _factor(value: float) -> str:
    """ "1.94x", "2x", "4,096x"."""
    text = number(value)
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}x"


def _room(ax: Any, labels: list[tuple[float, float, str, Any]]) -> float:
    """The share of the plot's width that labels beside points take, about."""
    letters = max((len(text) for _, _, text, _ in labels), default=0)
    return min((letters * _LETTER + 14) / points_size(ax)[0], 0.35)


def _log_limits(ticks: list[float], rooms: list[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis with `rooms` left and right of its ticks, as shares of the whole."""
    span = ticks[-1] / ticks[0] if ticks[-1] > ticks[0] else 2.0
    left, right = (room / (1 - sum(rooms)) for room in rooms)
    return ticks[0] / span**left, ticks[-1] * span**right


def _label(ax: Any, points: list[tuple[float, float, str, Any]], aside: float, ha: str) -> None:
    """Texts beside points of lines, so many points `aside`; those at one place in x keep apart."""
    for place in dict.fromkeys(x for x, *_ in points):
        here = [point for point in points if point[0] == place]
        moved = kept_apart([float(in_points(ax, x, y)[1]) for x, y, *_ in here], 10.5, points_size(ax)[1])
        for (x, y, text, color), up in zip(here, moved, strict=True):
            ax.annotate(
                *(text, (x, y)),
                xytext=(aside, up),
                textcoords="offset points",
                fontsize=8.5,
                ha=ha,
                va="center",
                color=color,
            )
