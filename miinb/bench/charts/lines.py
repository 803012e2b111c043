"""What charts of lines share: a line an arm (and what else varies), legends that leave room, labels that keep apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from miinb.bench.charts import frames, names
from miinb.bench.charts.style import BASELINES, finish, line_style

#: Dashes of the lines of one arm (its loads, models, runs), in order.
DASHES = ("-", "--", "-.", ":")
MARKERS = "o^DvPX*"
#: Legends of more lines stand beside the plot.
MOST_INSIDE = 4
LEGEND_WIDTH = 36  # characters
LINE_IN = 0.185  # of a legend


def arm_lines(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The style of each arm's line; markers tell them apart where colors are not printed."""
    found, others = {}, 0
    for arm in arms:
        found[arm] = line_style(arm, arms)
        if arm not in BASELINES:
            found[arm]["marker"] = MARKERS[others % len(MARKERS)]
            others += 1
    return found


def lines_of(rows: pd.DataFrame, x: str = "", by: str | None = None) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(name, style, rows in the order of `x` or of the loads): one line per arm, and per model, `by` or run.

    Where `x` or the load is the same twice on a line, runs have lines of their own.
    """
    arms = names.arms_in(rows)
    picturing = names.picturing(rows)
    loads = ["concurrency", "rate_rps", *(["batch_size"] if picturing else [])]
    rows = rows.assign(
        label=names.arm_labels(rows, by),
        run=names.run_names(rows),
        model=rows["model"].map(names.short_model).map(names.shown),
    )
    keys = ["arm"] + (["model"] if rows["model"].nunique() > 1 else [])
    if by and by not in (*keys, "concurrency", "rate_rps"):
        rows["by"] = names.by_labels(rows, by)
        keys.append("by")
    if picturing and _crossed(rows, x):
        rows["load"] = [_other_load(row, x) for _, row in rows.iterrows()]
        keys.append("load")
    if "run" not in keys and by != "run" and rows.duplicated([*keys, *([x] if x else loads)]).any():
        keys.append("run")
    styles, seen = arm_lines(arms), dict[str, int]()
    groups = sorted(rows.groupby(keys, sort=False), key=lambda item: arms.index(str(item[0][0])))
    for key_parts, line in groups:
        arm, *more = [str(part) for part in key_parts]
        style = dict(styles[arm])
        if len(groups) > len(arms):
            style["linestyle"] = DASHES[seen.get(arm, 0) % len(DASHES)]
        seen[arm] = seen.get(arm, 0) + 1
        label = "/".join(dict.fromkeys(line["label"]))  # one line may have several dtypes
        yield ", ".join([label, *more]), style, line.sort_values([x] if x else loads)


def _crossed(rows: pd.DataFrame, x: str) -> bool:
    """Whether pictures have several batches and several loads, of which an axis takes one."""
    loads = rows[["concurrency", "rate_rps"]].drop_duplicates()
    varied = len(loads) > 1 if x == "batch_size" else rows["batch_size"].nunique() > 1
    return varied and (bool(x) or len(loads) > 1)


def _other_load(row: pd.Series, x: str) -> str:
    """What of a point of pictures is not on the axis `x`."""
    if x == "batch_size":
        return names.load_label({**row, "batch_size": None}) or "one at a time"
    return names.load_label({**row, "concurrency": None, "rate_rps": None})


def legend_name(name: str) -> str:
    """A line's name for the legend: wrapped, so that it leaves room for the plot."""
    return names.legend_text(names.wrapped(name, LEGEND_WIDTH))


def height_for(entries: Sequence[str], least_in: float) -> float:
    """Inches of a chart whose legend has these entries."""
    if len(entries) <= MOST_INSIDE:
        return least_in
    return max(least_in, 1.6 + LINE_IN * sum(legend_name(name).count("\n") + 1 for name in entries))


def legend(ax: Any, *, beside: float = 1.0, inside: int = MOST_INSIDE) -> Any:
    """A legend inside the plot; of many lines to the right of it, from `beside` (a fraction of its width) on."""
    many = len(ax.get_legend_handles_labels()[1]) > inside
    where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (beside, 1.0)} if many else {"loc": "best"}
    return ax.legend(fontsize=8 if many else 8.5, frameon=False, **where)


def kept_apart(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """How far to move each of some labels, so that none is nearer than `gap` to another, above `top` or on the axis."""
    wanted = np.array(heights, dtype=float)
    placed = wanted.copy()
    for lower, upper in itertools.pairwise(np.argsort(wanted)):
        placed[upper] = max(placed[upper], placed[lower] + gap)
    placed -= max(float((placed - wanted).mean()), float(placed.max()) - top)
    placed += max(0.0, 0.7 * gap - float(placed.min()))  # half of the text's height above the axis, and a little
    return list(placed - wanted)


def points_size(ax: Any) -> tuple[float, float]:
    """Width and height of the plot in points, about: layout comes later."""
    width, height = ax.figure.get_size_inches()
    box = ax.get_position()
    return box.width * width * 72, box.height * height * 72


def in_points(ax: Any, x: float, y: float) -> np.ndarray[Any, Any]:
    """Where a value is drawn, in points from the plot's corner, about."""
    place: np.ndarray[Any, Any] = np.array(ax.transLimits.transform(ax.transScale.transform((x, y))))
    return place * points_size(ax)


#: Where a point's label may stand: offset in points, horizontal and vertical alignment.
_PLACES = (
    ((-5, 4), "right", "bottom"),
    ((5, -4), "left", "top"),
    ((5, 4), "left", "bottom"),
    ((-5, -4), "right", "top"),
)


def label_points(ax: Any, marks: Sequence[tuple[str, float, float, Any]]) -> None:
    """Each point's label where no earlier label or point is; none where all places are taken."""
    points = [in_points(ax, x, y) for _, x, y, _ in marks]
    taken = [(point[0] - 3, point[1] - 3, point[0] + 3, point[1] + 3) for point in points]
    for (text, x, y, color), point in zip(marks, points, strict=True):
        width, height = 5.2 * len(text), 8.5
        for (dx, dy), ha, va in _PLACES:
            left = point[0] + dx - (width if ha == "right" else 0)
            low = point[1] + dy - (height if va == "top" else 0)
            here = (left, low, left + width, low + height)
            if min(left, low) < 0 or any(_overlap(here, other) for other in taken):
                continue
            taken.append(here)
            ax.annotate(
                *(text, (x, y)), xytext=(dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=8.5, color=color
            )
            break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def hidden_value(ax: Any, text: str) -> None:
    """A value for the alternative text alone."""
    label = ax.annotate(text, (0, 0), visible=False)
    label.set_gid("miinb-value")


def finished(ax: Any, rows: pd.DataFrame, title: str, what: str) -> Any:
    """Title, caption and footer."""
    return finish(
        ax,
        title=title,
        subtitle=frames.subtitle(rows),
        caption=frames.caption(rows, what),
        footer=frames.footer(rows),
    )
