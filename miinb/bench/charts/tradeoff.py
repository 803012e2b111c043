"""What fewer bytes cost in quality, and what they gain in speed."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from miinb.bench.charts import frames, names
from miinb.bench.charts.lines import arm_lines, finished, height_for, hidden_value, label_points, legend, legend_name
from miinb.bench.charts.style import INK, SOFT, new_axes, plain_numbers
from miinb.bench.summary import ratio_text
from miinb.wording import number, one_line, shortened, size_words

#: What int8 may lose, in percent of perplexity (decision 16); drawn as a band.
ALLOWED = 0.5
BAND = "#009E73"


def quality(frame: Any, *, ax: Any = None) -> Any:
    """Change of perplexity against speed: a point an arm, labeled with what it costs, gains and weighs.

    Args:
        frame: runs of `miinb.bench.quality.measure`, their requests or their summary.
        ax: axes to draw on; None makes a figure.

    Raises:
        InvalidValue: no arm has a perplexity beside that of an unquantized one, or nothing was measured.
    """
    hint = "miinb.bench.quality.measure makes such runs; see requests['error'] where the unquantized arm failed."
    rows = frames.summary_of(frame, "quality")
    rows = frames.require(rows, ["perplexity_change"], "quality", hint, "perplexity to compare with")
    rows = frames.require(rows, ["tpot_p50_s"], "quality", "Requests need two new tokens.", "time per token")
    speeds = 1 / rows["tpot_p50_s"].astype(float)
    costs = rows["perplexity_change"].astype(float) * 100
    arms, styles = names.arm_labels(rows), arm_lines(names.arms_in(rows))
    labels = [names.joined(*pair) for pair in zip(arms, names.categories(rows), strict=True)]
    ax = new_axes(ax, height_for([f"{label} and what it is" for label in labels] * 2, 4.6))
    ax.set_xlim(0, float(speeds.max()) * 1.2)
    _cost_axis(ax, rows, costs)
    marks = []
    for index, arm, label in zip(rows.index, arms, labels, strict=True):
        row, speed, cost = rows.loc[index], speeds[index], costs[index]
        style = {name: styles[str(row["arm"])][name] for name in ("color", "marker")}
        _interval(ax, row, speed, style["color"])
        facts = _facts(row, _reference(rows, row))
        entry = "\n".join([legend_name(label), " · ".join(facts)])
        ax.plot([speed], [cost], linestyle="", markersize=8.5, zorder=3, label=entry, **style)
        hidden_value(ax, f"{label}: {', '.join([f'{number(speed)} tokens/s', *facts])}")
        marks.append((shortened(arm, 20), speed, cost, style["color"]))
    label_points(ax, marks)
    legend(ax, inside=0)
    ax.set_xlabel("Tokens per second, one request at a time", fontsize=9, color=INK)
    ax.set_ylabel("Change of perplexity (%)", fontsize=9, color=INK)
    ax.grid(True, color="#eeeeee", linewidth=0.7)
    plain_numbers(ax.xaxis)
    what = "Right and down is better; lines through points are 95% intervals of the change; sizes are of the weights"
    rows.attrs = {**rows.attrs, "notes": [*rows.attrs.get("notes", []), *_texts(rows)]}
    return finished(ax, rows, "What fewer bytes cost, and what they gain", what)


def _interval(ax: Any, row: pd.Series, speed: float, color: str) -> None:
    low, high = (float(row[f"perplexity_change_{end}"]) * 100 for end in ("lo", "hi"))
    if math.isfinite(low) and math.isfinite(high) and high > low:
        ax.plot([speed, speed], [low, high], color=color, linewidth=1.2, zorder=2)


def _reference(rows: pd.DataFrame, row: pd.Series) -> pd.Series | None:
    """The row of the arm that others of its run are compared with."""
    env = rows.attrs.get("env", {}).get(row["run_id"], {})
    found = rows[(rows["run_id"] == row["run_id"]) & (rows["arm"] == env.get("workload", {}).get("reference"))]
    return None if found.empty else found.iloc[0]


def _facts(row: pd.Series, reference: pd.Series | None) -> list[str]:
    """An arm's cost, its speed against the reference, and its size, in words."""
    change, words = float(row["perplexity_change"]), []
    if reference is not None and reference["arm"] == row["arm"]:
        words.append(f"perplexity {number(float(row['perplexity']))}")
    else:
        words.append(f"{change:+.2%}" if abs(change) < 0.01 else f"{change:+.1%}")
        if reference is not None:
            words.append(ratio_text(float(reference["tpot_p50_s"]) / float(row["tpot_p50_s"])))
    return [*words, *([size_words(float(row["weights_bytes"]))] if pd.notna(row["weights_bytes"]) else [])]


def _cost_axis(ax: Any, rows: pd.DataFrame, costs: pd.Series) -> None:
    """Limits around all points and intervals, the line at 0, and the band that int8 must stay in."""
    ends = [*costs, *(rows["perplexity_change_lo"].dropna() * 100), *(rows["perplexity_change_hi"].dropna() * 100)]
    low, high = min(0.0, *ends), max(2 * ALLOWED, *ends)
    margin = 0.16 * (high - low)
    ax.set_ylim(low - margin, high + margin)
    ax.axhline(0, color=SOFT, linewidth=0.9)
    ax.axhspan(0, ALLOWED, color=BAND, alpha=0.12, linewidth=0, label=f"int8 may lose {ALLOWED:g}%")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:+.10g}" if value else "0")


def _texts(rows: pd.DataFrame) -> list[str]:
    """Which text each run's perplexity is of."""
    found = []
    for run_id in dict.fromkeys(rows["run_id"].dropna()):
        asked = rows.attrs.get("env", {}).get(run_id, {}).get("workload", {})
        if "text" in asked:
            tokens = f"{asked['text_tokens']:,} tokens in windows of {asked['window']}"
            found.append(
                f"Perplexity of {shortened(one_line(str(asked['text'])), 60)}, {tokens}; requests have random prompts."
            )
    return list(dict.fromkeys(found))
