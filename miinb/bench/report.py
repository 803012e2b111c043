"""One self-contained HTML file of runs: table, charts, comparison, definitions, environment. No script, no network."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING

from miinb.bench.display import STYLE, narrow, notes, table_html
from miinb.bench.records import DEFINITIONS
from miinb.bench.store import write_atomically
from miinb.errors import InvalidValue

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
    "memory",
)
PAGE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;"
    "background:#fff}img{max-width:100%;display:block;margin:1rem 0}pre{overflow:auto;background:#f5f5f5;padding:1rem;"
    "font-size:12px}dt{font-weight:600}dd{margin:0 0 .4rem 1rem}"
)


def write_report(runs: Runs, path: Path) -> Path:
    """Write the report of `runs` to `path`."""
    definitions = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in DEFINITIONS.items())
    environment = html.escape(json.dumps(runs.env, indent=1, default=str, ensure_ascii=False))
    remarks = "".join(f'<div class="miinb-note">{html.escape(line)}</div>' for line in notes(runs))
    write_atomically(
        path,
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>miinb benchmark</title>"
        f"<style>{PAGE}</style>{STYLE}</head><body class='miinb-runs'><h1>Benchmark</h1>"
        f"{table_html(narrow(runs.summary))}{remarks}{''.join(_charts(runs))}"
        f"<h2>What the measures mean</h2><dl>{definitions}</dl>"
        f"<h2>Environment</h2><pre>{environment}</pre></body></html>\n",
    )
    return path


def _charts(runs: Runs) -> list[str]:
    """Each chart that the runs have data for, as an image with its alternative text."""
    from miinb.bench import charts

    found = []
    for kind in KINDS:
        try:
            ax = charts.draw(kind, runs)
        except InvalidValue:
            continue  # the runs have nothing of this kind
        image = base64.b64encode(charts.png(ax)).decode()
        found.append(f'<img alt="{html.escape(charts.alt_text(ax))}" src="data:image/png;base64,{image}">')
    return found
