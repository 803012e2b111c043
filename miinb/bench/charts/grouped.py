"""Horizontal bars (or dots), grouped, with whiskers, values and ratios to the baseline."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from miinb.bench.charts import frames, names
from miinb.bench.charts.style import (
    ELSEWHERE,
    INK,
    SOFT,
    ChartAxes,
    arm_style,
    finish,
    new_axes,
    plain_log_ticks,
    plain_numbers,
)
from miinb.bench.records import NAN
from miinb.bench.summary import is_worse, ratio_text
from miinb.errors import InvalidValue
from miinb.wording import number

BAR = 0.8  # height of a bar; 1 is the distance of neighbors
GAP = 0.7  # between groups
YEAR = "(2022)"  # published figures are compared with each other alone


class Bars:
    """Horizontal bars, one a row of a summary, grouped by what varies (model, load, run), or by a column.

    Ratios are to the baseline's bar of the same model, load and run, whatever the bars are grouped by.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        values: pd.Series,
        *,
        lower_is_better: bool,
        gpus: bool = False,
        by: str | None = None,
        worse: str = "slower",
    ) -> None:
        self.rows, self.values, self.lower_is_better = rows, values.astype(float), lower_is_better
        self.worse = worse
        self.low = self.high = pd.Series(NAN, index=rows.index)
        self.at_most = self.low  # where the intervals of the ratios end, if they have some
        self.ends = self.values  # where the bars end that labels stand behind
        self.notes: dict[Any, str] = {}  # by index: what the label says after value and ratio
        self.dots = False
        self.at: dict[Any, float] = {}  # where the bars were drawn, by index
        self.arms = names.arms_in(rows)
        self.groups = names.categories(rows)
        self.headings = names.by_labels(rows, by) if by else None  # in the place of the groups
        self.names = dict(zip(rows.index, names.row_labels(rows, gpus=gpus, by=by), strict=True))

    def on_log_axis(self, log: bool | None, spread: float = math.inf) -> None:
        """Dots on a logarithmic axis if `log`; of None where the values lie further apart than `spread`.

        Raises:
            InvalidValue: a value of 0 has no place there.
        """
        least, most = float(self.values.min()), float(self.values.max())
        if log and not least > 0:
            raise InvalidValue("log: a value is 0, which has no place on a logarithmic axis.")
        self.dots = (least > 0 and most / least > spread) if log is None else log

    def draw(self, ax: Any, scale: float, unit: str, *, below_in: float = 0.0) -> Any:
        """Bars (or dots), whiskers, value and ratio labels; values are shown times `scale` in `unit`.

        `below_in` are inches of a new figure for what stands below the axes.
        """
        groups = self.groups if self.headings is None else self.headings
        order = list(dict.fromkeys(groups))
        lines = max(names.wrapped(name).count("\n") for name in self.names.values()) + 1
        height = 1.95 + max(0.38, 0.17 * lines) * len(self.rows) + 0.28 * max(len(order) - 1, 0) + 0.3
        ax = new_axes(ax, height + below_in)
        ticks, texts, y = [], [], 0.0
        for group in order:
            members = self.rows[groups == group]
            ranked = sorted(members.index, key=lambda index: self.arms.index(str(self.rows.loc[index, "arm"])))
            for index in ranked:
                self._bar(ax, y, index, scale, unit)
                self.at[index] = y
                ticks.append(y)
                texts.append(names.wrapped(self.names[index]))
                y += 1.0
            if group:
                ax.annotate(
                    *(group.replace("\n", ", "), (0, y - len(ranked) - 0.62)),
                    xycoords=("axes fraction", "data"),
                    xytext=(5, 0),
                    textcoords="offset points",
                    fontsize=8.5,
                    fontweight="bold",
                    color=SOFT,
                    va="center",
                )
            y += GAP
        ax.set_yticks(ticks, texts)
        ax.set_ylim(y - GAP - 1 + 0.6, -0.6 - (0.35 if order != [""] else 0.0))
        if self.dots:
            ends = pd.concat([self.values, self.ends, self.low, self.high])
            ends = ends[ends > 0] * scale  # a whisker that ends at 0 has no place on the axis
            plain_log_ticks(ax, float(ends.min()) / 3, float(ends.max()) * 12)
        else:
            leave_room(ax)
        ax.xaxis.grid(True, color="#e3e3e3", linewidth=0.7)
        return ax

    def _bar(self, ax: Any, y: float, index: Any, scale: float, unit: str) -> None:
        value, arm = self.values[index] * scale, self.rows.loc[index, "arm"]
        style = arm_style(arm, self.arms)
        if self.dots:
            ax.plot([value], [y], "o", color=style["facecolor"], markeredgecolor=style["edgecolor"], markersize=9)
        else:
            ax.barh(y, value, height=BAR, **style)
        end = self.ends[index] * scale
        if math.isfinite(self.low[index]) and math.isfinite(self.high[index]):
            low, high = self.low[index] * scale, self.high[index] * scale
            ax.errorbar(
                *(value, y),
                xerr=[[max(value - low, 0)], [max(high - value, 0)]],
                fmt="none",
                ecolor=INK,
                elinewidth=1,
                capsize=3,
            )
            end = max(high, end)
        ratio = self._ratio(index)
        shown = f"${number(value)}" if unit == "$" else f"{number(value)} {unit}"
        text = "  ·  ".join(part for part in (shown, ratio, self.notes.get(index, "")) if part)
        value_label(ax, end, y, text, f"{self.names[index]}: ", bold=bool(ratio))

    def _ratio(self, index: Any) -> str:
        """ "5.7x", or "0.90x: slower" (or dearer) where the arm loses to the baseline."""
        arm = str(self.rows.loc[index, "arm"])
        reference = f"baseline {YEAR}" if arm.endswith(YEAR) else "baseline"
        same = (self.rows["arm"] == reference) & (self.groups == self.groups[index])
        if arm == reference or arm.endswith(ELSEWHERE) or not same.any():
            return ""
        base = float(self.values[same].iloc[-1])
        value = float(self.values[index])
        if not (base > 0 and value > 0):
            return ""
        ratio = base / value if self.lower_is_better else value / base
        return f"{ratio_text(ratio)}: {self.worse}" if is_worse(ratio, self.at_most[index]) else ratio_text(ratio)

    def finish(self, ax: Any, title: str, what: str, *, below: float = 0.0) -> Any:
        """Title, caption and footer; `below` as `style.finish` has it."""
        return finish(
            ax,
            title=title,
            subtitle=frames.subtitle(self.rows),
            caption=frames.caption(self.rows, what),
            footer=frames.footer(self.rows),
            below=below,
        )


def value_label(ax: Any, x: float, y: float, text: str, whose: str, *, bold: bool = False) -> None:
    """A label at the end of a bar; `whose` goes into the alternative text alone."""
    label = ax.annotate(
        *(text, (x, y)),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=INK,
        fontweight="bold" if bold else "normal",
    )
    label.set_gid("miinb-value")
    label.miinb_whose = whose


def leave_room(ax: Any) -> None:
    """A linear x axis from 0 that leaves room for the longest label behind its bar."""
    figure_in = ax.figure.get_figwidth()
    names_in = 0.5 + 0.075 * max(
        (len(line) for tick in ax.get_yticklabels() for line in tick.get_text().split("\n")), default=0
    )
    plot_in = (
        figure_in - max(1.7, names_in) if isinstance(ax, ChartAxes) else 0.85 * figure_in * ax.get_position().width
    )
    labels = [text for text in ax.texts if text.get_gid() == "miinb-value"]
    ends = [label.xy[0] / (1 - min((0.085 * len(label.get_text()) + 0.1) / plot_in, 0.6)) for label in labels]
    ax.set_xlim(0, max(ends, default=1.0) or 1.0)
    plain_numbers(ax.xaxis)
