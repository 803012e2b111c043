"""Charts of bars: latency, throughput, cost, time split, memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Patch

from miinb.bench.charts import frames, names
from miinb.bench.charts.grouped import BAR, Bars, leave_room, value_label
from miinb.bench.charts.measures import COSTS, METRICS, RATES, chosen, cost_of, per_gpu, rate_of
from miinb.bench.charts.style import IMAGE_PARTS, INK, OTHER, PARTS, finish, new_axes, time_unit, unit_word
from miinb.bench.records import NAN
from miinb.bench.summary import measured
from miinb.wording import number

LOG_FROM = 40.0  # spread of costs from which dots on a log axis tell more than bars
#: Spread of times and rates from which the smallest bar cannot be seen.
HIDDEN_FROM = 200.0
LOG_WORDS = " (log axis)"
#: The parts of a request's time that are in the model.
MODEL = ("model", "text_encode", "steps", "vae")
#: Between the parts of a bar.
BETWEEN = {"edgecolor": "white", "linewidth": 0.6}


def latency(
    frame: Any, *, ax: Any = None, metric: str = "e2e_s", by: str | None = None, log: bool | None = None
) -> Any:
    """Median latency of each arm with p5 to p95 whiskers and its ratio to the baseline.

    Args:
        frame: runs, requests or a summary.
        ax: axes to draw on; None makes a figure.
        metric: "e2e_s", "ttft_s", "tpot_s", "itl_s" or (of text-to-image) "image_s".
        by: what the bars are grouped by (`names.BY`: "dtype", "batch_size", "arm", ...); None: by what varies.
        log: dots on a logarithmic axis; None where bars would be too small to see.

    Raises:
        InvalidValue: there is no such metric or group, or the frame lacks it.
    """
    short = chosen(metric, METRICS, "latency").removesuffix("_s")
    rows = frames.require_metric(frames.summary_of(frame, "latency"), metric, "latency")
    bars = _bars(rows, f"{short}_p50_s", "latency", by, lower_is_better=True)
    rows = bars.rows
    if metric == "e2e_s" and names.encoding(rows):
        bars.notes = {index: f"{number(s * 1e3)} ms in the model" for index, s in rows["model_p50_s"].dropna().items()}
    if metric == "e2e_s":
        bars.at_most = rows["speedup_hi"]
    bars.low = rows[f"{short}_p5_s"].fillna(rows[f"{short}_min_s"])
    bars.high = rows[f"{short}_p95_s"].fillna(rows[f"{short}_max_s"])
    alone = rows["n"] == 1  # one request has no spread
    bars.low, bars.high = bars.low.mask(alone), bars.high.mask(alone)
    bars.on_log_axis(log, HIDDEN_FROM)
    least, most = float(bars.values.min()), float(np.nanmax([bars.values.max(), bars.high.max()]))
    scale, unit = time_unit(most if bars.dots or least > most / 100 else least)  # small ones stay readable
    ax = bars.draw(ax, scale, unit)
    ax.set_xlabel(unit_word(unit) + LOG_WORDS * bars.dots, fontsize=9, color=INK)
    return bars.finish(ax, METRICS[metric], f"Median{_spread_words(rows[bars.high.notna()], short)}")


def _bars(rows: pd.DataFrame, column: str, chart: str, by: str | None, **options: Any) -> Bars:
    """Bars of a column, in the order of the groups."""
    names.check_by(rows, by, chart)
    rows = names.in_order(rows, by)
    return Bars(rows, rows[column], by=by, **options)


def _spread_words(spread: pd.DataFrame, metric: str) -> str:
    """What the whiskers of these rows are."""
    few = spread[f"{metric}_p95_s"].isna()
    if spread.empty:
        return ""
    if few.all():
        return "; whiskers smallest to largest (below 20 requests)"
    return "; whiskers p5 to p95" + (" (smallest to largest below 20 requests)" if few.any() else "")


def throughput(
    frame: Any, *, ax: Any = None, metric: str | None = None, by: str | None = None, log: bool | None = None
) -> Any:
    """Output tokens (of encoder tasks: texts; images) a second of each arm and load; per GPU where all arms have GPUs.

    Args:
        frame: runs, requests or a summary.
        ax: axes to draw on; None makes a figure.
        metric: another rate: "total_tok_s", "req_s", "goodput_req_s", "seq_s", "img_s", "output_tok_s".
        by: as for `latency`.
        log: dots on a logarithmic axis; None where bars would be too small to see.
    """
    rows = frames.summary_of(frame, "throughput")
    rate = rate_of(rows, metric)
    rows = frames.require(rows, [rate], "throughput", _NO_RATE.get(rate, "No answers came."), RATES[rate].axis.lower())
    values, words = per_gpu(rows, rate)
    bars = _bars(rows.assign(value=values), "value", "throughput", by, lower_is_better=False, gpus=True)
    bars.on_log_axis(log, HIDDEN_FROM)
    ax = bars.draw(ax, 1.0, RATES[rate].unit)
    ax.set_xlabel(words + LOG_WORDS * bars.dots, fontsize=9, color=INK)
    per = " per GPU" if words.endswith(" per GPU") else ""
    what = RATES[rate].axis.removesuffix(" per second")
    return bars.finish(ax, f"Throughput{per}", f"{what} over the time of all requests")


_NO_RATE = {
    "img_s": "Only text-to-image runs have images.",
    "goodput_req_s": "Measure with objectives: bench(..., slo={'ttft': 0.5}).",
    "seq_s": "Only encoder tasks count texts.",
}


def cost(
    frame: Any, *, ax: Any = None, metric: str | None = None, by: str | None = None, log: bool | None = None
) -> Any:
    """US dollars per million output tokens (of text-to-image per thousand images) at the user's price.

    Args:
        frame: runs, requests or a summary.
        ax: axes to draw on; None makes a figure.
        metric: "usd_per_mtok", "usd_per_1k_texts" (encoder tasks) or "usd_per_1k_images".
        by: as for `latency`.
        log: dots on a logarithmic axis; None where costs lie far apart.
    """
    hint = "Give your price per GPU-hour (or machine-hour): bench(..., price=2.5)."
    rows = frames.summary_of(frame, "cost")
    metric = cost_of(rows, metric)
    unit = metric.removeprefix("usd_per_")
    rows = frames.require(rows, [metric], "cost", hint, f"cost of {COSTS[metric]}")
    bars = _bars(rows, metric, "cost", by, lower_is_better=True, gpus=True, worse="dearer")
    bars.on_log_axis(log, LOG_FROM)
    ax = bars.draw(ax, 1.0, "$")
    per = {"mtok": f"million {'' if names.encoding(rows) else 'output '}tokens"}.get(unit, COSTS[metric][2:])
    ax.set_xlabel(f"US dollars per {per}{LOG_WORDS * bars.dots}", fontsize=9, color=INK)
    prices = sorted(set(rows["price_usd_per_gpu_hour"].dropna()))
    with_gpus = rows["n_gpus"] > 0
    of = "GPU-hour" if with_gpus.all() else "machine-hour"
    of += " (of arms with GPUs a GPU-hour)" if with_gpus.any() and not with_gpus.all() else ""
    at = f" at ${' and $'.join(f'{price:g}' for price in prices)} a {of} (given by the user)" if prices else ""
    return bars.finish(ax, f"Cost of {COSTS[metric]}", f"Cost{at}")


def time_split(frame: Any, *, ax: Any = None, by: str | None = None) -> Any:
    """Where the mean request's time goes in each arm: queue, tokenize, model, detokenize, transport and client.

    Of text-to-image the model's part is the text encoder, the steps and the VAE decoder, and the last a picture's file.

    Args:
        frame: runs or requests.
        ax: axes to draw on; None makes a figure.
        by: as for `latency`.
    """
    requests = frames.requests_of(frame, "time_split")
    rows = frames.summary_of(requests, "time_split")
    names.check_by(rows, by, "time_split")
    rows = names.in_order(rows, by).reset_index(drop=True)
    ok, parts = measured(requests), IMAGE_PARTS if names.picturing(rows) else PARTS
    means = ok.groupby(["run_id", "arm", "point"])[[f"{part}_s" for part in (*parts, "e2e") if part != "rest"]].mean()
    means = means.loc[list(rows[["run_id", "arm", "point"]].itertuples(index=False, name=None))]
    means.columns = pd.Index([name.removesuffix("_s") for name in means.columns])
    known = means[[part for part in parts if part != "rest"]].fillna(0.0)
    means["rest"] = (means["e2e"] - known.sum(axis=1)).clip(lower=0.0)
    scale, unit = time_unit(float(means["e2e"].max()))
    means = means.reset_index(drop=True)
    bars = Bars(rows, means["e2e"], lower_is_better=True, by=by)
    bars.ends = means[list(parts)].sum(axis=1).clip(lower=means["e2e"])  # parts that overlap in time add up to more
    shares = means[[part for part in parts if part in MODEL]].sum(axis=1, min_count=1) / means["e2e"]
    bars.notes = {index: f"{share:.0%} in the model" for index, share in shares.dropna().items()}
    ax = bars.draw(ax, scale, unit)
    for bar in list(ax.patches):
        bar.remove()  # their parts take their place
    if names.encoding(rows):
        parts = parts | {"postprocess": ("answers", PARTS["postprocess"][1])}
    parts = {part: how for part, how in parts.items() if (means[part] > 0).any()}  # in one process there are fewer
    _parts(ax, bars, means * scale, parts)
    ax.set_xlabel(f"Mean {unit_word(unit)} per request", fontsize=9, color=INK)
    _legend(ax, len(parts))
    what = "Mean; baselines are hatched"
    return finish(
        ax,
        title="Where the time goes",
        subtitle=frames.subtitle(rows),
        caption=frames.caption(rows, what),
        footer=frames.footer(rows),
        legend_above=True,
    )


def _parts(ax: Any, bars: Bars, means: pd.DataFrame, parts: Mapping[str, tuple[str, str]]) -> None:
    """Each bar as its parts (their names and colors), one behind the other."""
    heights = [bars.at[index] for index in means.index]
    left = np.zeros(len(means))
    for part, (text, color) in parts.items():
        widths = means[part].fillna(0.0).to_numpy()
        drawn = ax.barh(heights, widths, left=left, height=BAR, color=color, label=text, **BETWEEN)
        for bar, arm in zip(drawn, bars.rows["arm"], strict=True):
            if arm.startswith("baseline"):
                bar.set(hatch="////")
        left += widths


def memory(frame: Any, *, ax: Any = None) -> Any:
    """Memory of each arm: weights, KV cache (of tasks that have one), and what else the ranks held."""
    columns = ["peak_mem_bytes", "weights_bytes", "kv_cache_bytes"]
    hint = "The deployments did not report their memory."
    rows = frames.require(frames.summary_of(frame, "memory"), columns, "memory", hint)
    rows = rows.drop_duplicates(["run_id", "arm"]).reset_index(drop=True)
    parts = rows[["weights_bytes", "kv_cache_bytes"]].astype(float).fillna(0.0)
    rest = (rows["peak_mem_bytes"].astype(float) - parts.sum(axis=1)).clip(lower=0.0).fillna(0.0)
    total = parts.sum(axis=1) + rest
    scale, unit = (1e-9, "GB") if total.max() >= 1e9 else (1e-6, "MB")
    rows[["concurrency", "rate_rps", "batch_size"]] = NAN  # the memory of all loads
    groups = names.categories(rows)
    shown = [
        ", ".join([arm, *filter(None, group.split("\n"))])
        for arm, group in zip(names.arm_labels(rows), groups, strict=True)
    ]
    ax = new_axes(ax, 2.3 + 0.42 * len(rows))
    left = np.zeros(len(rows))
    series = (
        ("weights", parts["weights_bytes"], "#0072B2"),
        ("KV cache", parts["kv_cache_bytes"], "#E69F00"),
        ("activations, libraries and the rest", rest, OTHER),
    )
    drawn = [one for one in series if one[0] != "KV cache" or one[1].any()]
    for text, values, color in drawn:
        ax.barh(range(len(rows)), values * scale, left=left, height=0.66, color=color, label=text, **BETWEEN)
        left += values.to_numpy() * scale
    for y, value in enumerate(total):
        value_label(ax, value * scale, y, f"{number(value * scale)} {unit}", f"{shown[y]}: ")
    ax.set_yticks(range(len(rows)), list(map(names.wrapped, shown)))
    ax.invert_yaxis()
    leave_room(ax)
    ax.set_xlabel(f"Memory of the ranks ({unit})", fontsize=9, color=INK)
    ax.xaxis.grid(True, color="#e3e3e3", linewidth=0.7)
    _legend(ax, len(drawn))
    return finish(
        ax,
        title="Memory",
        subtitle=frames.subtitle(rows),
        caption=["Largest sum over the ranks, read after each load point."],
        footer=frames.footer(rows),
        legend_above=True,
    )


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
