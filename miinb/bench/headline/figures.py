"""The charts of a headline: a panel a model, each with its own scale, the floor as a dashed line."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from miinb.bench import published
from miinb.bench.charts import frames
from miinb.bench.charts.grouped import Bars
from miinb.bench.charts.style import INK, finish, name_panel, new_panels, save, write_below
from miinb.bench.headline.suites import FP8_CACHE, Sizes, workload
from miinb.bench.headline.table import lengths, tok_s
from miinb.bench.records import NAN, Runs, load_runs
from miinb.errors import InvalidValue
from miinb.wording import number


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """What the chart of a suite shows: `value` of an arm is from the run's environment and the arm's summary row.

    Where there is no baseline `reference` is the arm that others are compared with; floors are then each arm's own.
    """

    title: str
    axis: str
    unit: str
    value: Callable[[Mapping[str, Any], pd.Series], float]
    floor: Callable[[Mapping[str, Any]], float]
    lower_is_better: bool
    what: str
    reference: str = ""


def _floor_ms(facts: Mapping[str, Any]) -> float:
    return float(facts.get("floor_s") or NAN) * 1e3


#: Characters of a caption's line: under the plots of these charts there is less room than under others.
WRAP = 122
FLOOR = "the floor, a token's weights read once at the speed of a copy on this machine"
KINDS = {
    "decode": Kind(
        "Time per token, one request at a time",
        "milliseconds a token",
        "ms",
        lambda env, row: float(row["tpot_p50_s"]) * 1e3,
        _floor_ms,
        True,
        f"Median time per output token; dashed line: {FLOOR}.",
    ),
    "cpu": Kind(
        "Tokens a second without a GPU, one request at a time",
        "tokens a second",
        "tokens/s",
        lambda env, row: 1 / float(row["tpot_p50_s"]),
        lambda facts: 1e3 / _floor_ms(facts),
        False,
        f"One over the median time per output token, in each arm's precision; floor: {FLOOR.partition(', ')[2]}.",
    ),
    "throughput": Kind(
        "Throughput, all requests at once",
        "output tokens a second",
        "tokens/s",
        tok_s,
        lambda facts: float(facts.get("floor_tok_s") or NAN),
        False,
        "Output tokens over the time from the first submit to the last token; floor: weights and cache read once a "
        "step at the speed of a copy, prompts at the speed of a matrix product.",
    ),
}
KINDS["ragged"] = Kind(
    *("Throughput, requests of all lengths at once", KINDS["throughput"].axis, "tokens/s", tok_s),
    *(KINDS["throughput"].floor, False, KINDS["throughput"].what),
)
KINDS["quantized"] = dataclasses.replace(
    KINDS["decode"],
    title="Time per token by the weights' precision",
    what="Median time per output token, one request at a time, and its ratio to the unquantized weights'; floor: the "
    "arm's own weights read once at the speed of a copy on this machine.",
    reference="optimized",
)
ARMS = {
    "baseline": "transformers, eager",
    "baseline-best": "its KV cache (static or not, compiled or not) that was fastest here",
    "baseline-continuous": "its continuous batching",
    "served": "optimized, behind its server",
    FP8_CACHE: "keys and values in one byte a number: answers can differ",
}


def draw(runs: Runs) -> dict[str, Any]:
    """A figure for each suite of the runs that has one, by the suite's name.

    Raises:
        InvalidValue: no run is of a headline, or nothing was measured.
    """
    figures = {}
    for suite, kind in KINDS.items():
        ids = [run_id for run_id, env in runs.env.items() if env.get("suite") == suite]
        panels = {run_id: rows for run_id in ids if len(rows := _rows(runs, run_id, suite, kind))}
        if panels:
            figures[suite] = _figure(runs, suite, kind, panels)
    if not figures:
        raise InvalidValue("These runs have nothing that the headline draws.", hint=f"Suites: {', '.join(KINDS)}.")
    return figures


def write(path: Path) -> list[Path]:
    """Draw the runs in a directory into it, a PNG a suite. Raises InvalidValue: there is nothing to draw."""
    return [save(figure, path / f"{suite}.png") for suite, figure in draw(load_runs(path)).items()]


def _rows(runs: Runs, run_id: str, suite: str, kind: Kind) -> pd.DataFrame:
    """The summary's rows of a run, with `value` and `note`, and the published figure of the model."""
    env = runs.env[run_id]
    rows = runs.summary[runs.summary["run_id"] == run_id].copy()
    rows["value"] = [kind.value(env, row) for _, row in rows.iterrows()]
    rows = rows[rows["value"] > 0].copy()  # what failed has none
    notes = []
    reference = next(iter(rows["value"][rows["arm"] == kind.reference]), NAN)
    for arm, value in zip(rows["arm"], rows["value"], strict=True):
        floor = kind.floor(env["arms"].get(arm, {}))
        share = floor / value if kind.lower_is_better else value / floor
        words = [f"{reference / value:.2f}x"] if math.isfinite(reference) and arm != kind.reference else []
        notes.append(" · ".join([*words, *([f"{share:.0%} of floor"] if math.isfinite(share) else [])]))
    rows["note"] = notes
    rows[["concurrency", "rate_rps"]] = NAN  # the load is in the caption; arms may have run a sample of it
    elsewhere = published.vllm(suite, str(env["model"])) if _as_published(env) else NAN
    if len(rows) and math.isfinite(elsewhere):
        last = rows.iloc[-1].to_dict() | {"arm": published.VLLM, "dtype": "", "value": elsewhere, "note": ""}
        rows = pd.DataFrame([*rows.to_dict("records"), last])
    return rows.reset_index(drop=True)


def _as_published(env: Mapping[str, Any]) -> bool:
    """Whether a run's GPU and lengths are those of the published figures."""
    same = ("prompt_tokens", "new_tokens", "requests")
    theirs, mine = workload(env["suite"], Sizes()).about(), env.get("workload", {})
    gpus = [gpu["name"] for gpu in env.get("host", {}).get("gpus", ())]
    return bool(gpus) and "H100" in gpus[0] and all(theirs[name] == mine.get(name) for name in same)


def _figure(runs: Runs, suite: str, kind: Kind, panels: Mapping[str, pd.DataFrame]) -> Any:
    every = pd.concat(list(panels.values()))
    every.attrs = {"env": runs.env}
    lines = [part for line in _caption(runs, kind, panels) for part in textwrap.wrap(line, WRAP)]
    lines += textwrap.wrap(frames.footer(every), WRAP)
    heights = [0.62 + 0.27 * len(rows) for rows in panels.values()]
    heights[0] += 0.3
    heights[-1] += 0.165 * len(lines)
    axes = new_panels(heights)
    for ax, (run_id, rows) in zip(axes, panels.items(), strict=True):
        _panel(ax, kind, rows, runs.env[run_id])
    dtypes = sorted({str(dtype) for dtype in every["dtype"] if dtype})
    words = [*(dtypes if len(dtypes) == 1 else ()), lengths(runs.env[next(iter(panels))])]
    finish(axes[0], title=kind.title, subtitle=" · ".join(words), caption=(), footer="", legend_above=True)
    axes[-1].set_xlabel(kind.axis, fontsize=9, color=INK)
    write_below(axes[-1], lines, WRAP)
    return axes[0].figure


def _panel(ax: Any, kind: Kind, rows: pd.DataFrame, env: Mapping[str, Any]) -> None:
    """Bars of one model, its name above them, the floor across them."""
    bars = Bars(rows, rows["value"], lower_is_better=kind.lower_is_better)
    bars.notes = dict(rows["note"])
    bars.draw(ax, 1.0, kind.unit)
    ax.locator_params(axis="x", nbins=6)
    floors = [kind.floor(facts) for facts in env["arms"].values()]
    floor = next((value for value in floors if math.isfinite(value)), NAN)
    name = str(env["model"])
    if math.isfinite(floor) and kind.unit == "ms" and not kind.reference:
        ax.axvline(floor, color=INK, linestyle="--", linewidth=1.0)
        name += f"   floor {number(floor)} {kind.unit}"
    name_panel(ax, name)


def _caption(runs: Runs, kind: Kind, panels: Mapping[str, pd.DataFrame]) -> list[str]:
    arms = {str(arm) for rows in panels.values() for arm in rows["arm"]}
    known = [f"{arm}: {words}" for arm, words in ARMS.items() if arm in arms]
    lines = [f"{kind.what} Random weights.", *(["; ".join(known) + "."] if known else [])]
    if published.VLLM in arms:
        lines.append(published.VLLM_NOTE)
    for run_id, rows in panels.items():
        env = runs.env[run_id]
        asked = env.get("workload", {})
        sample, every = asked.get("baseline_requests", 0), asked.get("requests", 0)
        if sample < every and any(str(arm).startswith("baseline") for arm in rows["arm"]):
            lines.append(f"{env['model']}: transformers ran {sample} of the {every} requests, of like lengths.")
        lines += [f"{env['model']}: {text}." for text in env.get("warnings", ())]
    return lines
