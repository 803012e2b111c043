"""Charts of lines: distribution, throughput against latency, scaling with batch and with GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from miinb.bench.charts import frames
from miinb.bench.charts.style import (
    GRID,
    INK,
    SOFT,
    finish,
    line_style,
    new_axes,
    plain_log_ticks,
    plain_numbers,
    time_unit,
)
from miinb.bench.summary import FEWEST, measured
from miinb.errors import InvalidValue, did_you_mean
from miinb.wording import number

STYLES = ("-", "--", "-.", ":")
LOG_FROM = 20.0  # spread of times from which a linear axis hides the short ones


def ecdf(frame: Any, *, ax: Any = None, metric: str = "e2e_s") -> Any:
    """Share of requests that took at most so long, one line per arm and load, with p50, p95 and p99 marked.

    Args:
        frame: runs or requests.
        ax: axes to draw on; None makes a figure.
        metric: "e2e_s", "ttft_s" or "tpot_s".

    Raises:
        InvalidValue: there is no such metric, no arm has it, or the frame has no single requests.
    """
    _check_metric(metric)
    requests = frames.requests_of(frame, "ecdf")
    every = frames.require_metric(frames.summary_of(requests, "ecdf"), metric, "ecdf")
    rows, ok = _some_loads(every), measured(requests)
    scale, unit = time_unit(float(ok[metric].max()))
    arms, labels, groups = frames.arms_in(rows), frames.arm_labels(rows), frames.categories(rows)
    styles = {group: _dashes(number) for number, group in enumerate(dict.fromkeys(groups))}
    ax = new_axes(ax)
    wide = ok[metric].quantile(0.99) > LOG_FROM * ok[metric].min() > 0
    if wide:
        plain_log_ticks(ax, float(ok[metric].min()) * scale / 1.2, float(ok[metric].max()) * scale * 1.2)
    for (_, row), group_key in zip(rows.iterrows(), groups, strict=True):
        mine = ok[(ok["run_id"] == row["run_id"]) & (ok["arm"] == row["arm"]) & (ok["point"] == row["point"])]
        values = np.sort(mine[metric].dropna().to_numpy(dtype=float)) * scale
        style = {**line_style(row["arm"], arms), "marker": None}
        if len(styles) > 1:
            style |= styles[group_key]
        group = group_key.replace("\n", ", ")
        name = f"{labels[row['arm']]}, {group}" if group else labels[row["arm"]]
        ax.step(
            [values[0], *values],
            np.arange(len(values) + 1) / len(values),
            where="post",
            label=frames.legend_text(name),
            **style,
        )
        for q in (50, 95, 99):
            if len(values) >= FEWEST[q]:
                at = float(np.percentile(values, q))
                ax.plot([at], [q / 100], "o", color=style["color"], markersize=5)
                _hidden_value(ax, f"{name} p{q}: {number(at)} {unit}")
    _percentile_lines(ax, int(rows["n"].max()))
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_ylabel("Share of requests", fontsize=9, color=INK)
    ax.set_xlabel(f"{frames.METRICS[metric]} ({unit}{', log axis' * bool(wide)})", fontsize=9, color=INK)
    ax.xaxis.grid(True, color="#eeeeee", linewidth=0.7)
    if len(rows) <= 2:
        ax.legend(fontsize=8.5, frameon=False, loc="lower right")
    else:
        ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.06, 1.0))
    what = "Dots mark percentiles with enough requests"
    if len(rows) < len(every):
        what += f"; {rows['point'].nunique()} of {every['point'].nunique()} loads are drawn"
    return _finish(ax, rows, f"Distribution: {frames.METRICS[metric].lower()}", what)


def _dashes(number: int) -> dict[str, Any]:
    """Line style of the loads in order; thinner when all have been used."""
    again, which = divmod(number, len(STYLES))
    return {"linestyle": STYLES[which], "linewidth": 1.8 / (1 + again)}


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
    """The rows of as many points as there are line styles: the first, the last, and some between."""
    points = list(dict.fromkeys(rows["point"]))
    if rows["run_id"].nunique() > 1 or len(points) <= len(STYLES):
        return rows
    kept = {points[round(i * (len(points) - 1) / (len(STYLES) - 1))] for i in range(len(STYLES))}
    return rows[rows["point"].isin(kept)]


def frontier(frame: Any, *, ax: Any = None, metric: str = "e2e_s", slo_s: float | None = None) -> Any:
    """Throughput against median latency (log axis), one line per arm, points labeled by load; up and left is better.

    Args:
        frame: runs, requests or a summary.
        ax: axes to draw on; None makes a figure.
        metric: "e2e_s", "ttft_s" or "tpot_s".
        slo_s: a latency objective in seconds to draw as a line; None takes that of the runs.
    """
    _check_metric(metric)
    column = f"{metric.removesuffix('_s')}_p50_s"
    rows = frames.require_metric(frames.summary_of(frame, "frontier"), metric, "frontier")
    scale, unit = time_unit(float(rows[column].max()))
    ax = new_axes(ax, 4.6)
    marks: list[tuple[str, float, float, str]] = []
    speeds, per = frames.per_gpu(rows, "output_tok_s", "tok_s_per_gpu")
    for name, style, line in _lines(rows.assign(speed=speeds)):
        x, y = line[column].to_numpy(dtype=float) * scale, line["speed"].to_numpy(dtype=float)
        ax.plot(x, y, label=frames.legend_text(name), **style)
        full = (line["saturated"] == True).to_numpy() if "saturated" in line else np.zeros(len(line), bool)  # noqa: E712
        ax.plot(x[full], y[full], "o", markersize=13, markerfacecolor="none", markeredgecolor=style["color"])
        for at_x, at_y, (_, row) in zip(x, y, line.iterrows(), strict=True):
            load = f"{row['rate_rps']:g}/s" if pd.notna(row["rate_rps"]) else f"{row['concurrency']:.0f}"
            marks.append((load, at_x, at_y, style["color"]))
            where = frames.load_label(row) + (" (saturated)" if row.get("saturated") is True else "")
            _hidden_value(ax, f"{name}, {where}: {number(at_y)} tokens/s at {number(at_x)} {unit}")
    slo_s = frames.objective_of(rows, metric) if slo_s is None else slo_s
    ends = [float(rows[column].min()), float(rows[column].max()), *([slo_s] if slo_s else [])]
    margin = max(1.4, (max(ends) / min(ends)) ** 0.1)
    plain_log_ticks(ax, min(ends) * scale / margin, max(ends) * scale * margin)
    if slo_s is not None:
        _objective(ax, slo_s * scale, f"objective {number(slo_s * scale)} {unit}")
    ax.set_ylim(0, float(speeds.max()) * 1.15)
    _label_points(ax, marks)
    plain_numbers(ax.yaxis)
    ax.grid(True, color="#eeeeee", linewidth=0.7)
    ax.set_xlabel(f"{frames.METRICS[metric]}, median ({unit}, log axis)", fontsize=9, color=INK)
    ax.set_ylabel(f"Output tokens per second{per}", fontsize=9, color=INK)
    ax.legend(fontsize=8.5, frameon=False, loc="best")
    loads = "requests per second" if rows["rate_rps"].notna().any() else "requests in flight"
    return _finish(
        *(ax, rows, "Throughput against latency"),
        f"Up and left is better; points are labeled with the {loads}{_saturation_words(rows)}",
    )


def _saturation_words(rows: pd.DataFrame) -> str:
    marked = "saturated" in rows and (rows["saturated"] == True).any()  # noqa: E712  # None where nothing was swept
    return "; a ring marks where the arm is saturated" if marked else ""


#: Where a point's label may stand: offset in points, horizontal and vertical alignment.
_PLACES = (
    ((-5, 4), "right", "bottom"),
    ((5, -4), "left", "top"),
    ((5, 4), "left", "bottom"),
    ((-5, -4), "right", "top"),
)


def _label_points(ax: Any, marks: Sequence[tuple[str, float, float, str]]) -> None:
    """Each point's label where no earlier label or point is; none where all places are taken."""
    figure_in, box = ax.figure.get_size_inches(), ax.get_position()
    size = (box.width * figure_in[0] * 72, box.height * figure_in[1] * 72)  # in points, about: layout comes later
    points = [np.array(ax.transLimits.transform(ax.transScale.transform((x, y)))) * size for _, x, y, _ in marks]
    taken = [(point[0] - 3, point[1] - 3, point[0] + 3, point[1] + 3) for point in points]
    for (text, x, y, color), point in zip(marks, points, strict=True):
        width, height = 5.2 * len(text), 8.5
        for (dx, dy), ha, va in _PLACES:
            left = point[0] + dx - (width if ha == "right" else 0)
            low = point[1] + dy - (height if va == "top" else 0)
            here = (left, low, left + width, low + height)
            if low < 0 or any(_overlap(here, other) for other in taken):
                continue
            taken.append(here)
            ax.annotate(
                *(text, (x, y)), xytext=(dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=8.5, color=color
            )
            break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


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


def batch_scaling(frame: Any, *, ax: Any = None) -> Any:
    """Output tokens a second over the number of requests in flight (or the batch size), with the ideal line."""
    rows = frames.summary_of(frame, "batch_scaling")
    by = "batch_size" if rows["batch_size"].nunique() > 1 else "concurrency"
    if rows[by].nunique() < 2:
        raise InvalidValue("charts.batch_scaling: there is one load only.", hint="bench(..., concurrency=[1, 4, 16])")
    words = "Batch size" if by == "batch_size" else "Requests in flight"
    return _scaling(rows[rows[by].notna()], by, words, "output_tok_s", "Scaling with concurrent requests", ax)


def parallel_scaling(frame: Any, *, ax: Any = None) -> Any:
    """Output tokens a second over the number of devices (tensor_parallel x replicas), with the ideal line."""
    rows = frames.summary_of(frame, "parallel_scaling").copy()
    rows["devices"] = rows["tp"].astype(float) * rows["replicas"].astype(float)
    if rows["devices"].nunique() < 2:
        raise InvalidValue(
            "charts.parallel_scaling: all runs have the same tensor_parallel and replicas.",
            hint="Add the runs of sessions with other numbers: runs_1 + runs_2.",
        )
    by = "Devices (tensor_parallel x replicas)"
    return _scaling(rows, "devices", by, "output_tok_s", "Scaling with devices", ax)


def _scaling(rows: pd.DataFrame, by: str, words: str, column: str, title: str, ax: Any) -> Any:
    """Lines of `column` over `by` on two logarithmic axes; from each line's first point its ideal one, dotted."""
    ax = new_axes(ax, 4.6)
    for name, style, line in _lines(rows, skip=by):
        x, y = line[by].to_numpy(dtype=float), line[column].to_numpy(dtype=float)
        ax.plot(x, y, label=frames.legend_text(name), **style)
        ax.plot(x, y[0] * x / x[0], color=style["color"], linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        gain = y[-1] / y[0]
        scaled = f" ({gain:.1f}x of {x[-1] / x[0]:.0f}x)" if len(line) > 1 else ""
        ax.annotate(
            *(f"{number(y[-1])}{scaled}", (x[-1], y[-1])),
            xytext=(7, 0),
            textcoords="offset points",
            fontsize=8.5,
            va="center",
            color=style["color"],
        )
        _hidden_value(ax, f"{name}: {number(y[0])} to {number(y[-1])} tokens/s, {gain:.1f}x of {x[-1] / x[0]:.0f}x")
    ticks = sorted(set(rows[by]))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xlim(ticks[0] / 1.15, ticks[-1] * (ticks[-1] / ticks[0]) ** 0.4)
    ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
    ax.minorticks_off()
    plain_numbers(ax.yaxis)
    ax.grid(True, color="#eeeeee", linewidth=0.7)
    ax.set_xlabel(f"{words} (log axis)", fontsize=9, color=INK)
    ax.set_ylabel("Output tokens per second (log axis)", fontsize=9, color=INK)
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}  # several lines leave no room among them
    ax.legend(fontsize=8.5, frameon=False, **({"loc": "upper left"} if len(ax.lines) <= 4 else beside))
    return _finish(ax, rows, title, "Dotted: ideal scaling from each line's first point")


def _lines(rows: pd.DataFrame, skip: str = "") -> Iterator[tuple[str, dict[str, Any], pd.DataFrame]]:
    """(name, style, rows by load): one line per arm, and per model or run where several are drawn."""
    arms, labels = frames.arms_in(rows), frames.arm_labels(rows)
    keys = ["arm"] + (["model"] if rows["model"].nunique() > 1 else [])
    per_arm = [skip] if skip == "devices" else ["concurrency", "rate_rps"]
    if rows.duplicated([*keys, *per_arm]).any():
        rows = rows.assign(run=frames.run_names(rows))
        keys.append("run")
    order = sorted(rows.groupby(keys, sort=False), key=lambda item: arms.index(str(item[0][0])))
    seen: dict[str, int] = {}
    for key_parts, line in order:
        key = [str(part) for part in key_parts]
        style = line_style(key[0], arms)
        style["marker"] = "os^Dv"[seen.get(key[0], 0) % 5] if len(order) > len(arms) else style["marker"]
        seen[key[0]] = seen.get(key[0], 0) + 1
        name = ", ".join([labels[key[0]], *(frames.shown(frames.short_model(part)) for part in key[1:])])
        yield name, style, line.sort_values(skip or ["concurrency", "rate_rps"])


def _check_metric(metric: str) -> None:
    if metric not in frames.METRICS:
        raise InvalidValue(f"metric: there is no latency {metric!r}.", hint=did_you_mean(metric, frames.METRICS))


def _hidden_value(ax: Any, text: str) -> None:
    """A value for the alternative text alone."""
    label = ax.annotate(text, (0, 0), visible=False)
    label.set_gid("miinb-value")


def _finish(ax: Any, rows: pd.DataFrame, title: str, what: str) -> Any:
    return finish(
        ax,
        title=title,
        subtitle=frames.subtitle(rows),
        caption=frames.caption(rows, what),
        footer=frames.footer(rows),
    )
