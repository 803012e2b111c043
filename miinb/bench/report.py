"""One self-contained HTML file of runs: table, charts, comparison, definitions, environment. No script, no network."""

from __future__ import annotations

import base64
import html
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from miinb.bench.cost import narrow as narrow_costs
from miinb.bench.display import SPREAD_TITLE, STYLE, narrow, notes, spread_html, table_html
from miinb.bench.records import DEFINITIONS, NAN
from miinb.bench.store import write_atomically
from miinb.bench.summary import task_kind
from miinb.bench.thumbnails import without
from miinb.bench.workload import load_words
from miinb.errors import InvalidValue
from miinb.wording import number, one_line, printable, size_words
from miinb.writing import HTML, check_file

if TYPE_CHECKING:
    from miinb.bench.records import Runs

KINDS = (
    "latency",
    "throughput",
    "cost",
    "time_split",
    "ecdf",
    "frontier",
    "batch_scaling",
    "parallel_scaling",
    "waterfall",
    "quality",
    "images",
    "memory",
)
PAGE = (
    ":root{color-scheme:light dark}"
    "body{font:15px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;"
    "background:#fff;overflow-wrap:anywhere}h1{font-size:1.6rem;margin:0 0 .3rem}"
    "h2{font-size:1.15rem;margin:2rem 0 .5rem}"
    "img{max-width:min(100%,50rem);height:auto;display:block;margin:0 0 2rem}"
    "pre{overflow:auto;background:#f5f5f5;padding:1rem;font-size:12px}dt{font-weight:600}dd{margin:0 0 .4rem 1rem}"
    ".miinb-wide{overflow-x:auto}body .miinb-wide td,body .miinb-wide th{padding:3px 7px;overflow-wrap:normal}"
    ".miinb-wide td:not(:first-child):not(.miinb-long){white-space:nowrap}"
    ".miinb-wide td:first-child{min-width:9em;overflow-wrap:anywhere}"
    "summary{cursor:pointer;font-weight:600}"
    ".miinb-answer{background:#eef5fb;border-left:4px solid #0072B2;padding:.5rem .8rem;margin:.6rem 0}"
    "@media (prefers-color-scheme:dark){body{color:#e6e6e6;background:#161616}pre{background:#242424}"
    ".miinb-answer{background:#14293a;border-left-color:#56B4E9}}"
    "@media print{details{display:block}img{break-inside:avoid}h2{break-after:avoid}}"
)


def write_report(runs: Runs, path: Path) -> Path:
    """Write the report of `runs` to `path`.

    Raises:
        InvalidValue: it cannot be written there, or has another ending than HTML's.
    """
    check_file(path, HTML)
    names = [one_line(str(facts.get("name") or run_id)) for run_id, facts in runs.env.items()]
    title = html.escape(f"Benchmark {', '.join(names)}" if len(names) <= 3 else f"{len(names)} benchmark runs")
    definitions = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in DEFINITIONS.items())
    facts = {run_id: without(env) for run_id, env in runs.env.items()}
    environment = html.escape(printable(json.dumps(facts, indent=1, default=str, ensure_ascii=False)))
    remarks = "".join(f'<div class="miinb-note">{html.escape(line)}</div>' for line in notes(runs))
    write_atomically(
        path,
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        "<meta name='viewport' content='width=device-width'>"
        f"<style>{PAGE}</style>{STYLE}</head><body class='miinb-runs'><h1>{title}</h1>"
        f"{''.join(_answers(runs))}"
        f"<h2>Medians over successful requests</h2>{_wide(table_html(_measures(runs)))}{remarks}"
        f"{_section(SPREAD_TITLE, spread_html(runs.summary))}"
        f"{_section('Cost', _cost(runs))}{_section('What runs', table_html(setup(runs)))}"
        f"<h2>Charts</h2>{''.join(_charts(runs))}"
        f"<details><summary>What the measures mean</summary><dl>{definitions}</dl></details>"
        f"<details><summary>Environment and workload</summary><pre>{environment}</pre></details></body></html>\n",
    )
    return path


def _measures(runs: Runs) -> pd.DataFrame:
    """The narrow table without what "What runs" tells."""
    return narrow(runs.summary).drop(columns=["memory", "loading s"], errors="ignore")


def _section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{_wide(body)}" if body else ""


def _wide(table: str) -> str:
    """A table that may be wider than the page, in a box that scrolls."""
    return f"<div class='miinb-wide'>{table}</div>"


def _answers(runs: Runs) -> list[str]:
    """What most readers look for: how much faster each arm is, whether its answers are the same, what is cheapest."""
    lines = []
    arms = list(dict.fromkeys(runs.summary["arm"]))
    table = runs.compare() if len(arms) > 1 else pd.DataFrame()
    if len(table):
        for arm, rows in table.groupby("arm", sort=False):
            shown = rows[rows["verdict"].str.contains("faster")]  # the interval leaves no doubt
            best = (shown if len(shown) else rows).sort_values("speedup", ascending=False).iloc[0]
            at = f" at {_load(best)}" if len(rows) > 1 and _load(best) else ""
            against = "" if best["baseline"] == "baseline" else f" than {best['baseline']}"
            words = f"{arm}: {best['verdict']}{against}{at}" + (", the most of its loads" if at else "")
            lines.append(words + _same(rows))
        lines += _best(runs)
    known = runs.summary[runs.summary["n"] > 0]
    if known["price_usd_per_gpu_hour"].notna().any() or known["slo_share"].notna().any():
        lines.append(runs.cost().answer)
    return [f"<div class='miinb-answer'>{html.escape(one_line(line))}</div>" for line in lines]


def _best(runs: Runs) -> list[str]:
    """Of images at several batches: each arm at its own best."""
    images = runs.summary[[task_kind(str(task)) == "image" for task in runs.summary["task"]]]
    if images["batch_size"].nunique() < 2 or not images["img_s"].notna().any():
        return []
    return [
        f"{row['arm']} at its best ({_load(row)}: {number(row['img_s'])} images/s) against {row['baseline']} "
        f"at its own ({_load(row, 'baseline_')}: {number(row['baseline_img_s'])} images/s): {row['verdict']}."
        for _, row in runs.compare(best=True).iterrows()
    ]


def _load(row: pd.Series, whose: str = "") -> str:
    """A point's load, of images with their batch; `whose` is before the columns' names."""
    rate, concurrency = row[f"{whose}rate_rps"], row[f"{whose}concurrency"]
    load = load_words("concurrency", concurrency) if pd.notna(concurrency) else ""
    load = load_words("rate", rate) if pd.notna(rate) else load
    image = task_kind(str(row.get("task", "text-to-image"))) == "image"
    batch = f"batch {row[f'{whose}batch_size']:g}" if image and pd.notna(row[f"{whose}batch_size"]) else ""
    return ", ".join(filter(None, (batch, "" if batch and concurrency == 1 else load)))


def _same(rows: pd.DataFrame) -> str:
    compared = rows[rows["n_compared"] > 0]
    if compared.empty:
        return "; answers were not compared."
    total = int(compared["n_compared"].sum())
    if compared["psnr_db"].notna().any():
        worst, most = float(compared["psnr_db"].min()), float(compared["max_abs_diff"].max())
        if math.isinf(worst):
            return f"; all pictures of {total} compared requests are identical."
        return f"; the most different picture of {total} requests has {worst:.1f} dB PSNR, at most {most:g} of 255."
    if all(value is True for value in compared["outputs_equal"]):
        return f"; all {total} compared answers are the same."
    share = float((compared["equal_share"] * compared["n_compared"]).sum()) / total
    return f"; the answers differ: on average {share:.0%} of one is the same ({total} compared)."


def _cost(runs: Runs) -> str:
    known = runs.summary[runs.summary["n"] > 0]
    if not known["price_usd_per_gpu_hour"].notna().any():
        return ""
    return table_html(narrow_costs(runs.cost()))


def setup(runs: Runs) -> pd.DataFrame:
    """One row per run and arm: what served, its memory, and how long it took to load."""
    rows = []
    for run_id, env in runs.env.items():
        for arm, facts in env.get("arms", {}).items():
            sizes = {name: facts.get(f"{name}_bytes") for name in ("weights", "kv_cache", "peak_mem")}
            gpus = int(facts.get("n_gpus") or 0)
            rows.append(
                {
                    "run": _run(runs, run_id) if len(runs) > 1 else "",
                    "arm": one_line(arm),
                    "model": one_line(str(facts.get("model") or "")),
                    "engine": str(facts.get("engine") or ""),
                    "precision": str(facts.get("dtype") or ""),
                    "GPUs": str(gpus) if gpus else "none",
                    "weights": _size(sizes["weights"]),
                    "KV cache": _size(sizes["kv_cache"]),
                    "most memory": _size(sizes["peak_mem"]),
                    "loading s": number(float(facts.get("load_s") or NAN), ""),
                }
            )
    frame = pd.DataFrame(rows, columns=None if rows else ["arm"])
    return frame[[name for name in frame.columns if (frame[name] != "").any()]]


def _run(runs: Runs, run_id: str) -> str:
    """What a run is called; with its id where others have its name."""
    name = runs.env[run_id].get("name")
    alike = sum(facts.get("name") == name for facts in runs.env.values()) > 1
    return one_line(" ".join(str(part) for part in (name, run_id if alike or not name else "") if part))


def _size(count: float | None) -> str:
    return size_words(count) if count and math.isfinite(count) else ""


def _charts(runs: Runs) -> list[str]:
    """Each chart that the runs have data for, as an image with its alternative text."""
    from miinb.bench import charts

    found = []
    swept = ("frontier", "batch_scaling") if runs.summary["point"].nunique() > 1 else ()  # what loads are measured for
    for kind in (*swept, *(kind for kind in KINDS if kind not in swept)):
        try:
            ax = charts.draw(kind, runs)
        except InvalidValue:
            continue  # the runs have nothing of this kind
        image = base64.b64encode(charts.png(ax)).decode()
        found.append(f'<img alt="{html.escape(charts.alt_text(ax))}" src="data:image/png;base64,{image}">')
    return found
