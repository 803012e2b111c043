"""The waterfall: what each step saves, down to the hardware's floor."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from miinb.bench.charts import frames, names
from miinb.bench.charts.grouped import leave_room, value_label
from miinb.bench.charts.style import INK, SOFT, arm_style, finish, new_axes, time_unit, unit_word
from miinb.bench.records import NAN
from miinb.bench.summary import ratio_text
from miinb.errors import InvalidValue
from miinb.wording import number

SAVES, COSTS = "#009E73", "#D55E00"
HEIGHT = 0.66


def waterfall(frame: Any, *, ax: Any = None, floor_s: float | None = None) -> Any:
    """What each step saves: arms in the order they ran, each with one change more than the one before.

    Args:
        frame: runs, requests or a summary, of three or more arms at one load.
        ax: axes to draw on; None makes a figure.
        floor_s: the least seconds that the hardware allows a request, drawn as a line; None takes that of the runs
            where it was measured (`floor_s`, seconds a token, of their arms).

    Raises:
        InvalidValue: fewer than three arms, or more than one load or model.
    """
    rows = frames.require(frames.summary_of(frame, "waterfall"), ["e2e_p50_s"], "waterfall", "")
    if len(rows) < 3 or rows["arm"].duplicated().any():
        raise InvalidValue(
            "charts.waterfall: draws three or more arms at one load, each a step after the one before.",
            hint="Compare sessions that differ by one option each; of several loads choose one: "
            "runs.requests.query('concurrency == 8').",
        )
    floor = _floor_of(rows) if floor_s is None else floor_s
    scale, unit = time_unit(float(rows["e2e_p50_s"].max()))
    values = [float(value) * scale for value in rows["e2e_p50_s"]]
    shown = names.arm_labels(rows)
    ax = new_axes(ax, 2.2 + 0.45 * len(rows))
    for y, value in enumerate(values):
        before = values[y - 1] if y else value
        _step(ax, y, value, before, arm_style(rows["arm"].iloc[y], [rows["arm"].iloc[y]]), y in (0, len(values) - 1))
        value_label(ax, max(value, before), y, _words(values, y, unit), f"{shown[y]}: ", bold=y == len(values) - 1)
    if math.isfinite(floor):
        _floor(ax, floor * scale, f"floor {number(floor * scale)} {unit}")
    ax.set_yticks(range(len(rows)), list(map(names.wrapped, shown)))
    ax.set_ylim(len(rows) - 0.5, -0.5 - 0.35 * math.isfinite(floor))
    leave_room(ax)
    ax.set_xlabel(f"Median {unit_word(unit)} per request", fontsize=9, color=INK)
    ax.xaxis.grid(True, color="#e3e3e3", linewidth=0.7)
    what = "Median; a step in green saves time, one in orange and dotted costs it"
    line = "dashed: the least that the hardware allows" if math.isfinite(floor) else ""
    if line and floor_s is None:
        line += f", the weights of {names.shown(rows['arm'].iloc[-1])} read once a token"
    return finish(
        ax,
        title="What each step saves",
        subtitle=frames.subtitle(rows),
        caption=frames.caption(rows, "; ".join(part for part in (what, line) if part)),
        footer=frames.footer(rows),
    )


def _words(values: list[float], y: int, unit: str) -> str:
    """An arm's time, the change from the one before, and of the last arm how much faster than the first it is."""
    shown = f"{number(values[y])} {unit}"
    if y == 0:
        return shown
    decimals = len(number(values[y]).partition(".")[2])
    in_all = f"  ·  {ratio_text(values[0] / values[y])} in all" if y == len(values) - 1 else ""
    return f"{shown} ({values[y] - values[y - 1]:+,.{decimals}f} {unit}){in_all}"


def _step(ax: Any, y: int, value: float, before: float, whole: dict[str, Any], ends: bool) -> None:
    """The change from the arm before; of the first and the last arm also the whole."""
    if ends:
        ax.barh(y, value, height=HEIGHT, **whole)
    if value <= before:
        ax.barh(y, before - value, left=value, height=HEIGHT, color=SAVES)
    else:
        ax.barh(y, value - before, left=before, height=HEIGHT, color=COSTS, hatch="..", edgecolor="white", linewidth=0)
    if y:  # from the end of the arm before
        ax.plot([before, before], [y - 1 + HEIGHT / 2, y - HEIGHT / 2], color=SOFT, linewidth=0.8)


def _floor(ax: Any, at: float, text: str) -> None:
    ax.axvline(at, color=INK, linestyle="--", linewidth=1.1)
    label = ax.annotate(
        *(text, (at, 1)),
        xycoords=("data", "axes fraction"),
        xytext=(4, -3),
        textcoords="offset points",
        va="top",
        fontsize=8.5,
        color=INK,
    )
    label.set_gid("miinb-value")
    label.miinb_whose = ""


def _floor_of(rows: pd.DataFrame) -> float:
    """The last arm's floor: seconds a token, of its facts, times its tokens; NaN where it was not measured."""
    last = rows.iloc[-1]
    facts = rows.attrs.get("env", {}).get(last["run_id"], {}).get("arms", {}).get(last["arm"], {})
    a_token = float(facts.get("floor_s") or NAN)
    return a_token * float(last["new_tokens"])
