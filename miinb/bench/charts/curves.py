"""Charts of curves: the distribution of times, and throughput against latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from miinb.bench.charts import frames, names
from miinb.bench.charts.lines import (
    DASHES,
    arm_lines,
    finished,
    height_for,
    hidden_value,
    label_points,
    legend,
    legend_name,
    lines_of,
)
from miinb.bench.charts.measures import METRICS, RATES, chosen, per_gpu, rate_of, samples
from miinb.bench.charts.style import GRID, INK, SOFT, new_axes, plain_log_ticks, plain_numbers, time_unit
from miinb.bench.summary import FEWEST, measured
from miinb.errors import InvalidValue
from miinb.wording import number

LOG_FROM = 20.0  # spread of times from which a linear axis hides the short ones
LOG_WORDS = ", log axis"
ZERO = "log: a time is 0, which has no place on a logarithmic axis."


def ecdf(frame: Any, *, ax: Any = None, metric: str = "e2e_s", by: str | None = None, log: bool | None = None) -> Any:
    """Share of requests that took at most so long, one line per arm and load, with p50, p95 and p99 marked.

    Args:
        frame: runs or requests.
        ax: axes to draw on; None makes a figure.
        metric: "e2e_s", "ttft_s", "tpot_s" or "itl_s" (the share of all gaps between chunks).
        by: what lines are told apart by besides the arm (`names.BY`: "dtype", "run", ...); None: by what varies.
        log: the axis is logarithmic; None where times lie far apart.

    Raises:
        InvalidValue: there is no such metric or group, no arm has it, or the frame has no single requests.
    """
    chosen(metric, METRICS, "latency")
    requests = frames.requests_of(frame, "ecdf")
    every = frames.require_metric(frames.summary_of(requests, "ecdf"), metric, "ecdf")
    names.check_by(every, by, "ecdf")
    by = None if by == "arm" else by  # lines are of one arm anyway
    rows = names.in_order(_some_loads(every), by)
    ok = measured(requests)
    found = [samples(_of(ok, row), metric).to_numpy() for _, row in rows.iterrows()]
    values = np.concatenate(found)
    scale, unit = time_unit(float(values.max()))
    labels, groups = names.arm_labels(rows, by), names.categories(rows, by)
    entries = [
        ", ".join([label, *group.split("\n")]) if group else label for label, group in zip(labels, groups, strict=True)
    ]
    ax = new_axes(ax, height_for(entries, 4.2))
    wide = _log_axis(ax, values * scale, log)
    styles = _styles(rows, groups)
    for name, style, times in zip(entries, styles, found, strict=True):
        _steps(ax, name, style, np.sort(times) * scale, unit)
    _percentile_lines(ax, max(len(times) for times in found))
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_ylabel("Share of gaps" if metric == "itl_s" else "Share of requests", fontsize=9, color=INK)
    ax.set_xlabel(f"{METRICS[metric]} ({unit}{LOG_WORDS * wide})", fontsize=9, color=INK)
    ax.xaxis.grid(True, color="#eeeeee", linewidth=0.7)
    drawn = legend(ax, beside=1.06, inside=2)
    for handle, style in zip(drawn.legend_handles, styles, strict=True):
        handle.set_marker(style["marker"])
    what = f"Marks are percentiles with enough {'gaps' if metric == 'itl_s' else 'requests'}"
    if len(rows) < len(every):
        loads = [frame.apply(names.load_label, axis=1).nunique() for frame in (rows, every)]
        what += f"; {loads[0]} of {loads[1]} loads are drawn"
    return finished(ax, rows, f"Distribution: {METRICS[metric].lower()}", what)


def _of(requests: pd.DataFrame, row: pd.Series) -> pd.DataFrame:
    """The requests of a row of the summary."""
    same = (requests["run_id"] == row["run_id"]) & (requests["arm"] == row["arm"])
    found: pd.DataFrame = requests[same & (requests["point"] == row["point"])]
    return found


def _log_axis(ax: Any, values: np.ndarray[Any, Any], log: bool | None) -> bool:
    """Make the x axis logarithmic if `log`; of None where the values lie far apart.

    Raises:
        InvalidValue: a value of 0 has no place there.
    """
    least, most = float(values.min()), float(values.max())
    if log and not least > 0:
        raise InvalidValue(ZERO)
    wide = bool(np.quantile(values, 0.99) > LOG_FROM * least > 0) if log is None else log
    if wide:
        plain_log_ticks(ax, least / 1.2, most * 1.2)
    return wide


def _styles(rows: pd.DataFrame, groups: pd.Series) -> list[dict[str, Any]]:
    """Line styles: colors and marks of the arms, dashes of the groups (of one group: of the arms)."""
    arms = names.arms_in(rows)
    known, dashes = arm_lines(arms), {group: _dashes(i) for i, group in enumerate(dict.fromkeys(groups))}
    others = [arm for arm in arms if known[arm]["linestyle"] == "-"]
    alone = {arm: _dashes(others.index(arm)) if arm in others else {} for arm in arms}
    pairs = zip(map(str, rows["arm"]), groups, strict=True)
    return [known[arm] | (dashes[group] if len(dashes) > 1 else alone[arm]) for arm, group in pairs]


def _dashes(number: int) -> dict[str, Any]:
    """Dashes in order; thinner when all have been used."""
    again, which = divmod(number, len(DASHES))
    return {"linestyle": DASHES[which], "linewidth": 1.8 / (1 + again)}


def _steps(ax: Any, name: str, style: dict[str, Any], values: np.ndarray[Any, Any], unit: str) -> None:
    """One line, its percentiles marked."""
    heights = np.arange(len(values) + 1) / len(values)
    ax.step([values[0], *values], heights, where="post", label=legend_name(name), **{**style, "marker": None})
    for q in (50, 95, 99):
        if len(values) >= FEWEST[q]:
            at = float(np.percentile(values, q))
            ax.plot([at], [q / 100], style["marker"], color=style["color"], markersize=5)
            hidden_value(ax, f"{name} p{q}: {number(at)} {unit}")


def _percentile_lines(ax: Any, n: int) -> None:
    """Lines at the percentiles that n requests have."""
    for q, va in ((50, "center"), (95, "top"), (99, "bottom")):
        if n < FEWEST[q]:
            continue
        ax.axhline(q / 100, color=GRID, linewidth=0.8, zorder=0)
        ax.annotate(
            *(f"p{q}", (1, q / 100)),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=8,
            color=SOFT,
            va=va,
        )


def _some_loads(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of as many loads as there are dashes: the first, the last, and some between."""
    labels = rows.apply(names.load_label, axis=1)
    loads = list(dict.fromkeys(labels))
    if len(loads) <= len(DASHES):
        return rows
    kept = {loads[round(i * (len(loads) - 1) / (len(DASHES) - 1))] for i in range(len(DASHES))}
    return rows[labels.isin(kept)]


def frontier(
    frame: Any,
    *,
    ax: Any = None,
    metric: str = "e2e_s",
    slo_s: float | None = None,
    by: str | None = None,
    log: bool | None = None,
) -> Any:
    """Throughput against median latency, one line per arm, points labeled by load; up and left is better.

    Args:
        frame: runs, requests or a summary.
        ax: axes to draw on; None makes a figure.
        metric: "e2e_s", "ttft_s", "tpot_s" or "itl_s".
        slo_s: a latency objective in seconds to draw as a line; None takes that of the runs.
        by: what lines are told apart by besides the arm, as for `ecdf`.
        log: the axis of the latency is logarithmic; None where it can be.

    Raises:
        InvalidValue: there is no such metric or group, or no arm has it; or the objective is no time.
    """
    if slo_s is not None and not 0 < slo_s < math.inf:
        raise InvalidValue(f"slo_s: {slo_s!r} is no time above 0.")
    column = f"{chosen(metric, METRICS, 'latency').removesuffix('_s')}_p50_s"
    rows = frames.require_metric(frames.summary_of(frame, "frontier"), metric, "frontier")
    rate = rate_of(rows, None)
    rows = frames.require(rows, [rate], "frontier", "No answers came.", RATES[rate].axis.lower())
    names.check_by(rows, by, "frontier")
    scale, unit = time_unit(float(rows[column].max()))
    speeds, axis = per_gpu(rows, rate)
    lines = list(lines_of(rows.assign(speed=speeds), by=by))
    ax = new_axes(ax, height_for([name for name, _, _ in lines], 4.6))
    marks: list[tuple[str, float, float, Any]] = []
    for name, style, line in lines:
        marks += _frontier_line(ax, name, style, line, column, scale, f"{RATES[rate].unit} at {{}} {unit}")
    slo_s = frames.objective_of(rows, metric) if slo_s is None else slo_s
    log = _latency_axis(ax, [*rows[column], *([slo_s] if slo_s else [])], scale, log)
    if slo_s is not None:
        _objective(ax, slo_s * scale, f"objective {number(slo_s * scale)} {unit}")
    ax.set_ylim(0, float(speeds.max()) * 1.15)
    label_points(ax, marks)
    plain_numbers(ax.yaxis)
    ax.grid(True, color="#eeeeee", linewidth=0.7)
    ax.set_xlabel(f"{METRICS[metric]}, median ({unit}{LOG_WORDS * log})", fontsize=9, color=INK)
    ax.set_ylabel(axis, fontsize=9, color=INK)
    legend(ax)
    loads = "requests per second" if rows["rate_rps"].notna().any() else "requests in flight"
    if names.picturing(rows) and all(line["batch_size"].nunique() > 1 for _, _, line in lines):
        loads = "batch"
    return finished(
        *(ax, rows, f"Throughput against {'latency' if metric == 'e2e_s' else METRICS[metric].lower()}"),
        f"Up and left is better; points are labeled with the {loads}{_saturation_words(rows)}",
    )


def _frontier_line(
    ax: Any, name: str, style: dict[str, Any], line: pd.DataFrame, column: str, scale: float, words: str
) -> list[tuple[str, float, float, Any]]:
    """One arm's line, rings where it is saturated; the labels of its points and where they are."""
    x, y = line[column].to_numpy(dtype=float) * scale, line["speed"].to_numpy(dtype=float)
    ax.plot(x, y, label=legend_name(name), **style)
    full = (line["saturated"] == True).to_numpy() if "saturated" in line else np.zeros(len(line), bool)  # noqa: E712
    ax.plot(x[full], y[full], "o", markersize=13, markerfacecolor="none", markeredgecolor=style["color"])
    marks = []
    batches = names.picturing(line) and line["batch_size"].nunique() > 1
    for at_x, at_y, (_, row) in zip(x, y, line.iterrows(), strict=True):
        mark = f"{row['batch_size']:g}" if batches else names.load_mark(row)
        marks.append((mark, at_x, at_y, style["color"]))
        where = names.load_label(row) + (" (saturated)" if row.get("saturated") is True else "")
        hidden_value(ax, f"{name}{where and ', '}{where}: {number(at_y)} {words.format(number(at_x))}")
    return marks


def _latency_axis(ax: Any, times: Sequence[float], scale: float, log: bool | None) -> bool:
    """Scale the x axis for these times; whether it is logarithmic.

    Raises:
        InvalidValue: a time of 0 has no place on a logarithmic one.
    """
    least, most = min(times), max(times)
    if log and not least > 0:
        raise InvalidValue(ZERO)
    if log or (log is None and least > 0):
        margin = max(1.4, (most / least) ** 0.1)
        plain_log_ticks(ax, least * scale / margin, most * scale * margin)
        return True
    ax.set_xlim(0, most * scale * 1.15 or 1.0)
    plain_numbers(ax.xaxis)
    return False


def _saturation_words(rows: pd.DataFrame) -> str:
    marked = "saturated" in rows and (rows["saturated"] == True).any()  # noqa: E712  # None where nothing was swept
    return "; a ring marks where the arm is saturated" if marked else ""


def _objective(ax: Any, at: float, text: str) -> None:
    """A dashed line at a latency that is the limit."""
    ax.axvline(at, color="#D55E00", linewidth=1.2, linestyle="--")
    ax.annotate(
        *(text, (at, 1)),
        xycoords=("data", "axes fraction"),
        xytext=(-4, -10),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#D55E00",
    )
