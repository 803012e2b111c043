"""Charts of bars: latency, throughput, cost, time split, memory, images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Patch

from miinb.bench.charts import frames
from miinb.bench.charts.style import (
    ELSEWHERE,
    INK,
    PARTS,
    SOFT,
    ChartAxes,
    arm_style,
    finish,
    new_axes,
    plain_log_ticks,
    plain_numbers,
    time_unit,
    unit_word,
)
from miinb.bench.records import NAN
from miinb.bench.summary import measured, ratio_text
from miinb.errors import InvalidValue, did_you_mean
from miinb.wording import number

BAR = 0.8  # height of a bar; 1 is the distance of neighbors
GAP = 0.7  # between groups
YEAR = "(2022)"  # published figures are compared with each other alone
LOG_FROM = 40.0  # spread of costs from which dots on a log axis tell more than bars


def latency(frame: Any, *, ax: Any = None, metric: str = "e2e_s") -> Any:
    """Median latency of each arm with p5 to p95 whiskers and its ratio to the baseline.

    Args:
        frame: runs, requests or a summary.
        ax: axes to draw on; None makes a figure.
        metric: "e2e_s", "ttft_s" or "tpot_s".

    Raises:
        InvalidValue: there is no such metric, or the frame lacks it.
    """
    if metric not in frames.METRICS:
        raise InvalidValue(f"metric: there is no latency {metric!r}.", hint=did_you_mean(metric, frames.METRICS))
    short = metric.removesuffix("_s")
    rows = frames.require_metric(frames.summary_of(frame, "latency"), metric, "latency")
    bars = Bars(rows, rows[f"{short}_p50_s"], lower_is_better=True)
    if metric == "e2e_s" and frames.encoding(rows):
        bars.notes = {index: f"{number(s * 1e3)} ms in the model" for index, s in rows["model_p50_s"].dropna().items()}
    bars.low = rows[f"{short}_p5_s"].fillna(rows[f"{short}_min_s"])
    bars.high = rows[f"{short}_p95_s"].fillna(rows[f"{short}_max_s"])
    alone = rows["n"] == 1  # one request has no spread
    bars.low, bars.high = bars.low.mask(alone), bars.high.mask(alone)
    least, most = float(bars.values.min()), float(np.nanmax([bars.values.max(), bars.high.max()]))
    scale, unit = time_unit(most if least > most / 100 else least)  # of times far apart the small ones stay readable
    ax = bars.draw(ax, scale, unit)
    ax.set_xlabel(unit_word(unit), fontsize=9, color=INK)
    return bars.finish(ax, frames.METRICS[metric], f"Median{_spread_words(rows[bars.high.notna()], short)}")


def _spread_words(spread: pd.DataFrame, metric: str) -> str:
    """What the whiskers of these rows are."""
    few = spread[f"{metric}_p95_s"].isna()
    if spread.empty:
        return ""
    if few.all():
        return "; whiskers smallest to largest (below 20 requests)"
    return "; whiskers p5 to p95" + (" (smallest to largest below 20 requests)" if few.any() else "")


def throughput(frame: Any, *, ax: Any = None) -> Any:
    """Output tokens (of encoder tasks: texts) a second of each arm and load; per GPU where all arms have GPUs."""
    rows = frames.summary_of(frame, "throughput")
    encoded = frames.encoding(rows)
    column, unit = ("seq_s", "texts/s") if encoded else ("output_tok_s", "tokens/s")
    rows = frames.require(rows, [column], "throughput", "No answers came.")
    a_gpu = rows.assign(a_gpu=rows[column] / rows["n_gpus"].clip(lower=1))
    values, per = frames.per_gpu(a_gpu, column, "a_gpu")
    bars = Bars(rows, values, lower_is_better=False, gpus=True)
    ax = bars.draw(ax, 1.0, unit)
    ax.set_xlabel(f"{'Texts' if encoded else 'Output tokens'} per second{per}", fontsize=9, color=INK)
    what = "Texts" if encoded else "Output tokens"
    return bars.finish(ax, f"Throughput{per}", f"{what} over the time of all requests")


def cost(frame: Any, *, ax: Any = None) -> Any:
    """US dollars per million output tokens at the user's price; dots on a log axis where costs lie far apart."""
    hint = "Give your price per GPU-hour (or machine-hour): bench(..., price=2.5)."
    rows = frames.require(frames.summary_of(frame, "cost"), ["usd_per_mtok"], "cost", hint)
    bars = Bars(rows, rows["usd_per_mtok"], lower_is_better=True, gpus=True)
    bars.dots = float(bars.values.max() / bars.values.min()) > LOG_FROM
    ax = bars.draw(ax, 1.0, "$")
    words = "" if frames.encoding(rows) else "output "
    ax.set_xlabel(f"US dollars per million {words}tokens", fontsize=9, color=INK)
    prices = sorted(set(rows["price_usd_per_gpu_hour"].dropna()))
    with_gpus = rows["n_gpus"] > 0
    of = "GPU-hour" if with_gpus.all() else "machine-hour"
    of += " (of arms with GPUs a GPU-hour)" if with_gpus.any() and not with_gpus.all() else ""
    at = f" at ${' and $'.join(f'{price:g}' for price in prices)} a {of} (given by the user)" if prices else ""
    return bars.finish(ax, "Cost of a million tokens", f"Cost{at}")


def time_split(frame: Any, *, ax: Any = None) -> Any:
    """Where the mean request's time goes in each arm: queue, tokenize, model, detokenize, transport and client."""
    requests = frames.requests_of(frame, "time_split")
    rows = frames.summary_of(requests, "time_split").reset_index(drop=True)
    ok = measured(requests)
    means = ok.groupby(["run_id", "arm", "point"])[[f"{part}_s" for part in (*PARTS, "e2e") if part != "rest"]].mean()
    means = means.loc[list(rows[["run_id", "arm", "point"]].itertuples(index=False, name=None))]
    means.columns = pd.Index([name.removesuffix("_s") for name in means.columns])
    known = means[[part for part in PARTS if part != "rest"]].fillna(0.0)
    means["rest"] = (means["e2e"] - known.sum(axis=1)).clip(lower=0.0)
    scale, unit = time_unit(float(means["e2e"].max()))
    means = means.reset_index(drop=True)
    bars = Bars(rows, means["e2e"], lower_is_better=True)
    shares = means["model"] / means["e2e"]
    bars.notes = {index: f"{share:.0%} in the model" for index, share in shares.dropna().items()}
    ax = bars.draw(ax, scale, unit)
    for bar in list(ax.patches):
        bar.remove()  # their parts take their place
    _parts(ax, bars, means * scale, "answers" if frames.encoding(rows) else PARTS["postprocess"][0])
    ax.set_xlabel(f"Mean {unit_word(unit)} per request", fontsize=9, color=INK)
    _legend(ax, len(PARTS))
    what = "Mean; baselines are hatched"
    return finish(
        ax,
        title="Where the time goes",
        subtitle=frames.subtitle(rows),
        caption=frames.caption(rows, what),
        footer=frames.footer(rows),
        legend_above=True,
    )


def _parts(ax: Any, bars: Bars, means: pd.DataFrame, last: str) -> None:
    """Each bar as its parts, one behind the other; `last` names what comes after the model."""
    heights = [bars.at[index] for index in means.index]
    left = np.zeros(len(means))
    for part, (text, color) in PARTS.items():
        widths = means[part].fillna(0.0).to_numpy()
        name = last if part == "postprocess" else text
        drawn = ax.barh(heights, widths, left=left, height=BAR, color=color, label=name)
        for bar, arm in zip(drawn, bars.rows["arm"], strict=True):
            if arm.startswith("baseline"):
                bar.set(hatch="////", edgecolor="white", linewidth=0.0)
        left += widths


def memory(frame: Any, *, ax: Any = None) -> Any:
    """Memory of each arm: weights, KV cache, and what else the ranks held."""
    columns = ["peak_mem_bytes", "weights_bytes", "kv_cache_bytes"]
    hint = "The deployments did not report their memory."
    rows = frames.require(frames.summary_of(frame, "memory"), columns, "memory", hint)
    rows = rows.drop_duplicates(["run_id", "arm"]).reset_index(drop=True)
    parts = rows[["weights_bytes", "kv_cache_bytes"]].astype(float).fillna(0.0)
    rest = (rows["peak_mem_bytes"].astype(float) - parts.sum(axis=1)).clip(lower=0.0).fillna(0.0)
    total = parts.sum(axis=1) + rest
    scale, unit = (1e-9, "GB") if total.max() >= 1e9 else (1e-6, "MB")
    labels = frames.arm_labels(rows)
    names = [labels[arm] for arm in rows["arm"]]
    if rows["arm"].duplicated().any():
        names = [f"{name}, {run}" for name, run in zip(names, frames.run_names(rows), strict=True)]
    ax = new_axes(ax, 2.3 + 0.42 * len(rows))
    left = np.zeros(len(rows))
    series = (
        ("weights", parts["weights_bytes"], "#0072B2"),
        ("KV cache", parts["kv_cache_bytes"], "#E69F00"),
        ("activations, libraries and the rest", rest, "#CC79A7"),
    )
    for text, values, color in series:
        ax.barh(range(len(rows)), values * scale, left=left, height=0.66, color=color, label=text)
        left += values.to_numpy() * scale
    for y, value in enumerate(total):
        value_label(ax, value * scale, y, f"{number(value * scale)} {unit}", f"{names[y]}: ")
    ax.set_yticks(range(len(rows)), names)
    ax.invert_yaxis()
    leave_room(ax)
    ax.set_xlabel(f"Memory of the ranks ({unit})", fontsize=9, color=INK)
    ax.xaxis.grid(True, color="#e3e3e3", linewidth=0.7)
    _legend(ax, 3)
    return finish(
        ax,
        title="Memory",
        subtitle=frames.subtitle(rows.assign(concurrency=NAN, rate_rps=NAN)),
        caption=["Largest sum over the ranks, read after each load point."],
        footer=frames.footer(rows),
        legend_above=True,
    )


def images(frame: Any, *, ax: Any = None) -> Any:
    """Images a second of each arm; per GPU where all arms have GPUs."""
    hint = "Only text-to-image runs have images."
    rows = frames.require(frames.summary_of(frame, "images"), ["img_s"], "images", hint)
    values, per = frames.per_gpu(rows, "img_s", "img_s_per_gpu")
    bars = Bars(rows, values, lower_is_better=False, gpus=True)
    ax = bars.draw(ax, 1.0, "images/s")
    ax.set_xlabel(f"Images per second{per}", fontsize=9, color=INK)
    return bars.finish(ax, f"Images per second{per}", "Images over the time of all requests")


class Bars:
    """Horizontal bars, one a row of a summary, grouped by what varies (model, load, run)."""

    def __init__(self, rows: pd.DataFrame, values: pd.Series, *, lower_is_better: bool, gpus: bool = False) -> None:
        self.rows, self.values, self.lower_is_better = rows, values.astype(float), lower_is_better
        self.low = self.high = pd.Series(NAN, index=rows.index)
        self.notes: dict[Any, str] = {}  # by index: what the label says after value and ratio
        self.dots = False
        self.at: dict[Any, float] = {}  # where the bars were drawn, by index
        self.arms = frames.arms_in(rows)
        self.groups = frames.categories(rows)
        self.names = dict(zip(rows.index, frames.row_labels(rows, gpus=gpus), strict=True))

    def draw(self, ax: Any, scale: float, unit: str) -> Any:
        """Bars (or dots), whiskers, value and ratio labels; values are shown times `scale` in `unit`."""
        order = {group: number for number, group in enumerate(dict.fromkeys(self.groups))}
        ax = new_axes(ax, 1.95 + 0.38 * len(self.rows) + 0.28 * max(len(order) - 1, 0) + 0.3)
        ticks, texts, y = [], [], 0.0
        for group in order:
            members = self.rows[self.groups == group]
            ranked = sorted(members.index, key=lambda index: self.arms.index(str(self.rows.loc[index, "arm"])))
            for index in ranked:
                self._bar(ax, y, index, scale, unit)
                self.at[index] = y
                ticks.append(y)
                texts.append(self.names[index])
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
        ax.set_ylim(y - GAP - 1 + 0.6, -0.6 - (0.35 if list(order) != [""] else 0.0))
        if self.dots:
            plain_log_ticks(ax, float(self.values.min()) * scale / 3, float(self.values.max()) * scale * 12)
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
        end = value
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
            end = max(high, value)
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
        ratio = base / value if self.lower_is_better else value / base
        if not math.isfinite(ratio) or not ratio > 0:
            return ""
        worse = "dearer" if self.values.name == "usd_per_mtok" else "slower"
        return f"{ratio_text(ratio)}: {worse}" if ratio < 0.995 else ratio_text(ratio)

    def finish(self, ax: Any, title: str, what: str) -> Any:
        """Title, caption and footer."""
        return finish(
            ax,
            title=title,
            subtitle=frames.subtitle(self.rows),
            caption=frames.caption(self.rows, what),
            footer=frames.footer(self.rows),
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
    names_in = 0.5 + 0.075 * max((len(tick.get_text()) for tick in ax.get_yticklabels()), default=0)
    plot_in = (
        figure_in - max(1.7, names_in) if isinstance(ax, ChartAxes) else 0.85 * figure_in * ax.get_position().width
    )
    labels = [text for text in ax.texts if text.get_gid() == "miinb-value"]
    ends = [label.xy[0] / (1 - min((0.085 * len(label.get_text()) + 0.1) / plot_in, 0.6)) for label in labels]
    ax.set_xlim(0, max(ends, default=1.0) or 1.0)
    plain_numbers(ax.xaxis)


def _legend(ax: Any, columns: int) -> None:
    parts, labels = ax.get_legend_handles_labels()
    ax.legend(
        *([Patch(facecolor=part[0].get_facecolor()) for part in parts], labels),
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        fontsize=8,
        frameon=False,
        borderaxespad=0.2,
        handlelength=1.2,
        columnspacing=1.2,
    )
