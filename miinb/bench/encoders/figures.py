"""The charts of encoders: times with the floor, where a served request's time goes, rates, many clients."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from miinb.bench import published
from miinb.bench.charts import frames
from miinb.bench.charts.bars import latency, time_split
from miinb.bench.charts.grouped import GAP, Bars
from miinb.bench.charts.style import INK, finish, name_panel, new_panels, save, write_below
from miinb.bench.encoders.table import RATES, floor_share, same, work
from miinb.bench.encoders.table import value as value_of
from miinb.bench.records import NAN, Runs, load_runs, rows_of
from miinb.errors import InvalidValue

WRAP = 122


@dataclass(frozen=True, slots=True)
class Kind:
    """What the chart of a suite shows."""

    title: str
    axis: str
    unit: str
    what: str


_FLOOR = (
    "Floor (dashed where times are drawn): the weights read once at the speed of a large copy, or their products at "
    "that of a large one, whichever takes longer"
)
_ENDS = (
    "transformers: a forward pass from inputs on the device, its logits stay there; optimized: from tokens on the "
    "host to results on the host"
)
KINDS = {
    "latency": Kind("One text at a time, without a server", "milliseconds a text", "ms", f"Median. {_ENDS}. {_FLOOR}."),
    "cpu": Kind("One text at a time on a CPU", "milliseconds a text", "ms", f"Median. {_ENDS}. {_FLOOR}."),
    "throughput": Kind(
        "Throughput, all texts of full length",
        "texts a second",
        "texts/s",
        f"Median pass over all texts; transformers at its best batch. {_FLOOR}.",
    ),
    "mixed": Kind(
        "Throughput, texts of mixed lengths",
        "useful tokens a second",
        "tokens/s",
        f"Padding does not count; transformers at its best batch. {_FLOOR}.",
    ),
    "embeddings": Kind(
        "Embeddings of many texts, from text to vector", "texts a second", "texts/s", "Median of whole calls."
    ),
    "clients": Kind("Many clients at once", "requests a second", "requests/s", "Each client asks again at once."),
}
ARMS = {
    "baseline": {
        "latency": "transformers, eager, sdpa",
        "clients": "transformers' pipeline behind a lock, a thread a client",
        "embeddings": "transformers' pipeline and mean pooling",
        "mixed": "transformers, padded in order of arrival",
    },
    "baseline-sorted": {"": "padded batches of texts sorted by length"},
    "baseline-best": {"": "transformers under torch.compile"},
    "optimized": {"": "miinb's engine", "clients": "miinb's server", "embeddings": "miinb's server"},
}


def draw(runs: Runs, *, beside: bool = False) -> dict[str, Any]:
    """A figure for each suite of the runs, by name; of "served" also one a family with the times end to end.

    Args:
        runs: of `python -m miinb.bench.encoders`.
        beside: MII's published figures of 2022 stand beside the served times.

    Raises:
        InvalidValue: no run is of these suites, or nothing was measured.
    """
    figures = {}
    for suite, kind in KINDS.items():
        rows = _rows(runs, suite)
        if len(rows):
            figures[suite] = _figure(runs, suite, kind, rows)
    served = _runs_of(runs, "served")
    if served is not None:
        figures["served"] = time_split(served).figure
        for family in dict.fromkeys(served.summary["model"].str.split("-").str[0]):
            figures[f"end_to_end_{family}"] = end_to_end(served, family, beside=beside)
    if not figures:
        raise InvalidValue("These runs have nothing of encoders to draw.", hint=f"Suites: {', '.join(KINDS)}, served.")
    return figures


def write(path: Path, *, published: bool = False) -> list[Path]:
    """Draw the runs in a directory into it, PNGs. Raises InvalidValue: there is nothing to draw."""
    return [save(figure, path / f"{name}.png") for name, figure in draw(load_runs(path), beside=published).items()]


def end_to_end(runs: Runs, family: str, *, beside: bool = False) -> Any:
    """The served times of a family's models and tasks: the figures 5 and 6 of MII's README, measured.

    Args:
        runs: of the suite "served".
        family: how the models' names begin: "roberta" (figure 5), "bert" (figure 6).
        beside: MII's own bars stand beside them, where it published the shape and task.
    """
    summary = runs.summary[runs.summary["model"].str.split("-").str[0] == family]
    summary.attrs = runs.summary.attrs
    return latency(published.beside(summary) if beside else summary).figure


def _runs_of(runs: Runs, suite: str) -> Runs | None:
    ids = [run_id for run_id, env in runs.env.items() if env.get("suite") == suite]
    rows = [row for row in rows_of(runs) if row["run_id"] in ids and row["status"] == "ok"]
    return Runs(rows, {run_id: runs.env[run_id] for run_id in ids}) if rows else None


def _rows(runs: Runs, suite: str) -> pd.DataFrame:
    """The summary's rows of a suite that have a value, with `value` and `note`."""
    ids = [run_id for run_id, env in runs.env.items() if env.get("suite") == suite]
    rows = runs.summary[runs.summary["run_id"].isin(ids) & (runs.summary["n"] > 0)].copy()
    rows["value"] = [value_of(suite, row) * (1.0 if suite in RATES else 1e3) for _, row in rows.iterrows()]
    notes, floors = [], []
    for _, row in rows.iterrows():
        facts = runs.env[row["run_id"]]["arms"].get(row["arm"], {})
        share = floor_share(suite, facts, row)
        notes.append(f"{share:.0%} of floor" if math.isfinite(share) else "")
        floors.append(float(facts.get("floor_s") or NAN) * 1e3)
    rows["note"], rows["floor"] = notes, floors
    rows[["concurrency", "batch_size"]] = NAN  # the load is in the subtitle
    return rows.reset_index(drop=True)


def _figure(runs: Runs, suite: str, kind: Kind, rows: pd.DataFrame) -> Any:
    """A panel a model; of clients one for the rate and one for the slowest of twenty requests."""
    parts: list[tuple[str, pd.DataFrame, Callable[[Any, pd.DataFrame], None]]] = [
        (str(model), part.reset_index(drop=True), _panel(kind)) for model, part in rows.groupby("model", sort=False)
    ]
    if suite == "clients" and rows["e2e_p95_s"].notna().all():
        slow = rows.assign(value=rows["e2e_p95_s"] * 1e3, note="")
        late = Kind("", "milliseconds, 95th percentile", "ms", "")
        parts.append(("95 % of the requests are answered within", slow, _panel(late, label=True)))
    every = rows.copy()
    every.attrs = {"env": runs.env}
    lines = [part for line in _caption(runs, suite, kind, rows) for part in textwrap.wrap(line, WRAP)]
    lines += textwrap.wrap(frames.footer(every), WRAP)
    heights = [0.85 + 0.29 * (len(part) + GAP * part["task"].nunique()) for _, part, _ in parts]
    heights[0] += 0.5
    heights[-1] += 0.165 * len(lines)
    axes = new_panels(heights)
    for ax, (name, part, panel) in zip(axes, parts, strict=True):
        panel(ax, part)
        title = name if part["task"].nunique() > 1 or " " in name else f"{name}, {part['task'].iloc[0]}"
        name_panel(ax, title)
    dtypes = sorted({str(dtype) for dtype in rows["dtype"] if dtype})
    words = [*(dtypes if len(dtypes) == 1 else ()), work(runs.env[rows["run_id"].iloc[0]])]
    finish(axes[0], title=kind.title, subtitle=" · ".join(words), caption=(), footer="", legend_above=True)
    if suite != "clients":
        axes[-1].set_xlabel(kind.axis, fontsize=9, color=INK)
    write_below(axes[-1], lines, WRAP)
    return axes[0].figure


def _panel(kind: Kind, *, label: bool = False) -> Callable[[Any, pd.DataFrame], None]:
    """Draws the bars of a model: a group a task."""

    def draw(ax: Any, rows: pd.DataFrame) -> None:
        bars = Bars(rows, rows["value"], lower_is_better=kind.unit == "ms")
        bars.groups = rows["task"] if rows["task"].nunique() > 1 else pd.Series("", index=rows.index)
        bars.notes = dict(rows["note"])
        bars.draw(ax, 1.0, kind.unit)
        ax.locator_params(axis="x", nbins=6)
        if kind.unit == "ms" and not label:
            for index, y in bars.at.items():
                ax.plot([rows.loc[index, "floor"]] * 2, [y - 0.5, y + 0.5], "--", color=INK, linewidth=1.0)
        if label or kind.unit == "requests/s":
            ax.set_xlabel(kind.axis, fontsize=9, color=INK)

    return draw


def _caption(runs: Runs, suite: str, kind: Kind, rows: pd.DataFrame) -> list[str]:
    known = {str(arm): ARMS.get(str(arm).split(" ")[0], {}) for arm in rows["arm"]}
    named = {arm: texts.get(suite, texts.get("", texts.get("latency", ""))) for arm, texts in known.items()}
    merged = {text: " / ".join(arm for arm in named if named[arm] == text) for text in named.values() if text}
    lines = [f"{kind.what} Random weights.", "; ".join(f"{names}: {text}" for text, names in merged.items()) + "."]
    agreed: dict[str, list[str]] = {}
    for _, row in rows.iterrows():
        if text := same(row):
            facts = runs.env[row["run_id"]]["arms"].get(row["arm"], {})
            agreed.setdefault(str(row["arm"]), []).append(text)
            if "cosine" in facts:
                agreed[str(row["arm"])][-1] += f" (cosine at least {facts['cosine']:.4f})"
    told: dict[str, list[str]] = {}
    for arm, texts in agreed.items():
        words = "all" if set(texts) == {"yes"} else "; ".join(texts).replace("yes", "all")
        told.setdefault(words, []).append(arm)
    lines += [f"{', '.join(arms)}: the same answers as baseline's in {words} requests." for words, arms in told.items()]
    for run_id in dict.fromkeys(rows["run_id"]):
        env = runs.env[run_id]
        for arm, facts in env["arms"].items():
            if "client_processes" in facts:
                lines.append(f"{arm}: asked by {facts['client_processes']} processes on {facts['cores']} cores.")
        lines += [f"{env['model']}, {env['task']}: {text}." for text in env.get("warnings", ())]
    return lines
