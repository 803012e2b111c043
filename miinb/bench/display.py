"""Runs as a narrow table: escaped HTML for a notebook, text elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from miinb.bench.environment import hardware_words
from miinb.bench.summary import encodes, ratio_text
from miinb.wording import number

if TYPE_CHECKING:
    from miinb.bench.records import Runs

STYLE = (
    "<style>.miinb-runs table{border-collapse:collapse;font-size:13px}"
    ".miinb-runs th,.miinb-runs td{padding:3px 10px;text-align:right;border-bottom:1px solid #8886}"
    ".miinb-runs th:first-child,.miinb-runs td:first-child{text-align:left}"
    ".miinb-runs .miinb-note{opacity:.75;font-size:12px;margin:4px 0}</style>"
)


def narrow(summary: pd.DataFrame) -> pd.DataFrame:
    """The columns that most readers want, as text; those that say nothing are left out."""
    many_models, many_runs = summary["model"].nunique() > 1, summary["run_id"].nunique() > 1
    rows = [_row(row, many_models=many_models, many_runs=many_runs) for _, row in summary.iterrows()]
    frame = pd.DataFrame(rows)
    return frame[[name for name in frame.columns if (frame[name] != "").any()]] if rows else frame


def _row(row: pd.Series, *, many_models: bool, many_runs: bool) -> dict[str, str]:
    load = f"{row['rate_rps']:g}/s" if pd.notna(row["rate_rps"]) else _whole(row["concurrency"])
    return {
        "run": str(row["name"] or row["run_id"]) if many_runs else "",
        "model": str(row["model"]) if many_models else "",
        "arm": str(row["arm"]),
        "dtype": str(row["dtype"] or ""),
        "load": load,
        "n": _whole(row["n"]),
        "failed": _whole(row["n_failed"]),
        "TTFT ms": _ms(row["ttft_p50_s"]),
        "TPOT ms": _ms(row["tpot_p50_s"]),
        "total ms": _ms(row["e2e_p50_s"]),
        "texts/s": number(row["seq_s"], ""),
        "tokens/s": number(row["output_tok_s"], ""),
        "$/Mtok": number(row["usd_per_mtok"], ""),
        "speed-up": _speedup(row),
        "same answers": _answers(row),
    }


def _speedup(row: pd.Series) -> str:
    if pd.isna(row["speedup"]):
        return ""
    interval = f" ({row['speedup_lo']:.2f}-{row['speedup_hi']:.2f})" if pd.notna(row["speedup_lo"]) else ""
    return f"{ratio_text(row['speedup'])}{interval}{' slower' if row['speedup'] < 0.995 else ''}"


def _answers(row: pd.Series) -> str:
    if not row["n_compared"]:
        return ""
    if pd.isna(row["n_equal"]):
        share = f"{row['equal_share']:.0%}"
        return f"{share} of labels" if encodes(str(row["task"])) else f"first {share} of tokens"
    return "yes" if row["outputs_equal"] else f"{row['n_equal']:.0f} of {row['n_compared']:.0f}"


def _ms(value: float) -> str:
    return number(value * 1e3, "")


def _whole(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else ""


def notes(runs: Runs) -> list[str]:
    """What a reader of the table must know: hardware, run ids, medians, warnings."""
    lines = []
    for run_id, env in runs.env.items():
        hardware = hardware_words(env.get("host", {}))
        lines.append(" · ".join(part for part in (f"run {run_id}", env.get("name") or "", hardware) if part))
        lines += [f"note: {text}" for text in env.get("warnings", ())]
    return lines


def runs_text(runs: Runs) -> str:
    """The narrow table and its notes as text."""
    table = narrow(runs.summary)
    body = table.to_string(index=False) if len(table) else "no requests"
    return "\n".join([f"{_count(runs)} (medians over successful requests)", body, *notes(runs)])


def runs_html(runs: Runs) -> str:
    """The narrow table and its notes as HTML; every text is escaped."""
    footer = "".join(f'<div class="miinb-note">{html.escape(line)}</div>' for line in notes(runs))
    title = html.escape(f"{_count(runs)}, medians over successful requests")
    return f'{STYLE}<div class="miinb-runs"><b>{title}</b>{table_html(narrow(runs.summary))}{footer}</div>'


def table_html(frame: pd.DataFrame) -> str:
    """A frame as a plain table; every text is escaped."""
    head = _cells("th", [str(name) for name in frame.columns])
    body = "".join(_cells("td", ["" if pd.isna(v) else str(v) for v in row]) for row in frame.to_numpy().tolist())
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"


def _count(runs: Runs) -> str:
    return f"{len(runs)} run{'s' * (len(runs) != 1)}"
