"""Runs as a narrow table: escaped HTML for a notebook, text elsewhere."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from miinb.bench.environment import differences, hardware_words
from miinb.bench.pixels import psnr_words
from miinb.bench.summary import is_worse, ratio_text, reference_arm, task_kind
from miinb.bench.sweeping import saturation_words
from miinb.bench_fields import slo_words
from miinb.wording import number, one_line, size_words

if TYPE_CHECKING:
    from collections.abc import Iterable

    from miinb.bench.records import Runs

STYLE = (
    "<style>.miinb-runs{overflow-x:auto}.miinb-runs table{border-collapse:collapse;font-size:12px}"
    ".miinb-runs th,.miinb-runs td{padding:3px 5px;text-align:right;border-bottom:1px solid #8886}"
    ".miinb-runs th:first-child,.miinb-runs td:first-child{text-align:left}"
    ".miinb-runs .miinb-note{opacity:.75;font-size:12px;margin:4px 0}</style>"
)


def narrow(summary: pd.DataFrame) -> pd.DataFrame:
    """The columns that most readers want, as text; those that say nothing are left out."""
    many_models, many_runs = summary["model"].nunique() > 1, summary["run_id"].nunique() > 1
    many_sizes = summary["batch_size"].nunique() > 1
    rows = [
        _row(row, run if many_runs else "", many_models=many_models, many_sizes=many_sizes)
        for (_, row), run in zip(summary.iterrows(), run_labels(summary), strict=True)
    ]
    return _without_empty(pd.DataFrame(rows))


def run_labels(summary: pd.DataFrame) -> list[str]:
    """What each row's run is called: its name, else its id, and both where two runs have one name."""
    ids = [one_line(str(run_id)) for run_id in summary["run_id"]]
    names = [one_line(str(name)) if pd.notna(name) and name else "" for name in summary["name"]]
    of_name: dict[str, set[str]] = {}
    for name, run_id in zip(names, ids, strict=True):
        of_name.setdefault(name, set()).add(run_id)
    pairs = zip(names, ids, strict=True)
    return [run_id if not name else f"{name} {run_id}" if len(of_name[name]) > 1 else name for name, run_id in pairs]


def _row(row: pd.Series, run: str, *, many_models: bool, many_sizes: bool) -> dict[str, str]:
    load, kind = _load(row), task_kind(str(row["task"]))
    return {
        "run": run,
        "model": one_line(str(row["model"])) if many_models else "",
        "arm": one_line(str(row["arm"])),
        "dtype": one_line(str(row["dtype"] or "")),
        "load": f"{load} (saturated)" if row["saturated"] is True else load,
        **_size_cell(row, many_sizes),
        "speed-up": _speedup(row),
        "pictures" if kind == "image" else "same answers": _answers(row),
        "perplexity": _perplexity(row),
        "n": _whole(row["n"]),
        "failed": f"{row['n_failed']:.0f} ({one_line(row['failures'])})" if row["n_failed"] else "0",
        "stopped": _whole(row["n_cancelled"]) if row["n_cancelled"] else "",
        "TTFT ms": _ms(row["ttft_p50_s"]),
        "TPOT ms": _ms(row["tpot_p50_s"]),
        "total ms": _ms(row["e2e_p50_s"]),
        "s/image": number(row["image_p50_s"], ""),
        "ms/step": _ms(row["step_p50_s"]),
        "overhead": f"{row['overhead']:.1%}" if pd.notna(row["overhead"]) else "",
        "images/s": _spread(row, "img_s"),
        "texts/s": _spread(row, "seq_s"),
        "tokens/s": _spread(row, "output_tok_s"),
        "SLO met": f"{row['slo_share']:.0%}" if pd.notna(row["slo_share"]) else "",
        "goodput/s": number(row["goodput_req_s"], ""),
        "$/Mtok": "" if kind == "encoder" else number(row["usd_per_mtok"], ""),
        "$/1k texts": number(row["usd_per_1k_texts"], ""),
        "$/1k images": number(row["usd_per_1k_images"], ""),
        "memory": _size(row["peak_mem_bytes"]),
        "loading s": number(row["load_s"], ""),
    }


def _size_cell(row: pd.Series, many_sizes: bool) -> dict[str, str]:
    """Pictures or texts of a request, where they vary."""
    name = "batch" if task_kind(str(row["task"])) == "image" else "texts"
    return {name: _whole(row["batch_size"]) if many_sizes else ""}


def _load(row: pd.Series) -> str:
    return f"{row['rate_rps']:g}/s" if pd.notna(row["rate_rps"]) else _whole(row["concurrency"])


def _spread(row: pd.Series, name: str) -> str:
    """A rate; of several passes with the width of their values around the median."""
    spread = row[f"{name}_spread"]
    return number(row[name], "") + (f" (±{spread / 2:.1%})" if pd.notna(spread) and pd.notna(row[name]) else "")


def _size(count: float) -> str:
    return size_words(int(count)) if math.isfinite(count) else ""


#: Measures with percentiles: how the tables name them.
MEASURES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "total"}
SPREAD_TITLE = "Percentiles: p50 / p90 / p95 / p99"
QUANTILES = (50, 90, 95, 99)
FEW = "p90 needs 10 samples, p95 20 and p99 100: a dash stands where they are too few"


def percentiles(summary: pd.DataFrame) -> pd.DataFrame:
    """One row per row of the summary and measure, in seconds: p50, p90, p95, p99, NaN where samples are too few."""
    rows = [
        {
            **{name: row[name] for name in ("run_id", "arm", "model", "concurrency", "rate_rps", "point")},
            "measure": f"{metric}_s",
            "samples": row["n_gaps"] if metric == "itl" else row["n"],
            **{f"p{q}": row[f"{metric}_p{q}_s"] for q in QUANTILES},
        }
        for _, row in summary.iterrows()
        for metric in MEASURES
        if pd.notna(row[f"{metric}_p50_s"])
    ]
    frame = pd.DataFrame(rows)
    frame.attrs = {**summary.attrs, "few": few_words(row["measure"] for row in rows)}
    return frame


def spread_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The percentiles of each arm and load as text, "12 / 15 / 19 / -" a measure."""
    shown = {metric: f"{name} ms" for metric, name in MEASURES.items()}
    many_models, many_runs = summary["model"].nunique() > 1, summary["run_id"].nunique() > 1
    many_sizes, rows = summary["batch_size"].nunique() > 1, []
    measured = summary[summary["n"] > 0]
    for (_, row), run in zip(measured.iterrows(), run_labels(measured), strict=True):
        cells = {metric: [_ms(row[f"{metric}_p{q}_s"]) or "-" for q in QUANTILES] for metric in MEASURES}
        known = {shown[metric]: " / ".join(texts) if texts[0] != "-" else "" for metric, texts in cells.items()}
        which = {"run": run if many_runs else "", "model": one_line(str(row["model"])) if many_models else ""}
        which |= {"arm": one_line(str(row["arm"])), "load": _load(row), **_size_cell(row, many_sizes)}
        rows.append({**which, **known})
    return _without_empty(pd.DataFrame(rows))


def _without_empty(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that have a text; of rows that lack one it is empty."""
    frame = frame.fillna("")
    return frame[[name for name in frame.columns if (frame[name] != "").any()]]


def _speedup(row: pd.Series) -> str:
    if pd.isna(row["speedup"]):
        return ""
    interval = f" ({row['speedup_lo']:.2f}-{row['speedup_hi']:.2f})" if pd.notna(row["speedup_lo"]) else ""
    slower = " slower" if is_worse(row["speedup"], row["speedup_hi"]) else ""
    return f"{ratio_text(row['speedup'])}{interval}{slower}"


def _answers(row: pd.Series) -> str:
    if not row["n_compared"]:
        return ""
    kind = task_kind(str(row["task"]))
    if kind == "image":
        return psnr_words(row["psnr_db"]) if pd.notna(row["psnr_db"]) else "other sizes"
    if pd.isna(row["n_equal"]) and row["equal_share"] == 1:
        return "all labels" if kind == "encoder" else "all tokens"
    if pd.isna(row["n_equal"]):
        share = f"{row['equal_share']:.0%}"
        return f"{share} of labels" if kind == "encoder" else f"first {share} of tokens"
    return "yes" if row["outputs_equal"] else f"{row['n_equal']:.0f} of {row['n_compared']:.0f}"


def _perplexity(row: pd.Series) -> str:
    change = row["perplexity_change"]
    words = f" ({change:+.2%})" if pd.notna(change) and change else ""
    return number(row["perplexity"], "") + words if pd.notna(row["perplexity"]) else ""


def _ms(value: float) -> str:
    return number(value * 1e3, "")


def _whole(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else ""


def notes(runs: Runs) -> list[str]:
    """What a reader of the table must know: hardware, run ids, medians, warnings."""
    lines = []
    if (runs.summary["passes"] > 1).any():
        lines.append("Rates and percentiles are medians over the passes, with half of their spread.")
    if runs.summary["psnr_db"].notna().any():
        lines.append("pictures: PSNR to the baseline's of the same prompt and seed, of the picture that differs most")
    lines += _speedup_words(runs.summary)
    for run_id, env in runs.env.items():
        hardware = hardware_words(env.get("host", {}))
        lines.append(" · ".join(part for part in (f"run {run_id}", env.get("name") or "", hardware) if part))
        if slo := env.get("workload", {}).get("slo"):
            lines.append(f"objectives: {slo_words(slo)}")
        lines += [saturation_words(arm, found) for arm, found in (env.get("saturation") or {}).items()]
        lines += [f"note: {text}" for text in env.get("warnings", ())]
    named = zip(run_labels(runs.summary), runs.summary["run_id"], strict=True)
    hosts = {run: runs.env.get(run_id, {}).get("host") or {} for run, run_id in named}
    return [one_line(line) for line in (*lines, *(f"note: {text}" for text in differences(hosts)))]


def _speedup_words(summary: pd.DataFrame) -> list[str]:
    """Of what the speed-ups are, and against which arms."""
    against: dict[str, list[str]] = {}
    for run_id in summary["run_id"][summary["speedup"].notna()].unique():
        against.setdefault(reference_arm(summary, run_id), []).append(str(run_id))
    several = len(against) > 1
    return [
        f"speed-up: of the median total time, against {arm}" + f" (run {', '.join(ids)})" * several
        for arm, ids in against.items()
    ]


def runs_text(runs: Runs) -> str:
    """The narrow table and its notes as text."""
    table = narrow(runs.summary)
    body = table.to_string(index=False) if len(table) else "no requests"
    spread = spread_table(runs.summary)
    more = [SPREAD_TITLE, spread.to_string(index=False), few_words(spread.columns)] if len(spread) else []
    return "\n".join([f"{_count(runs)} (medians over successful requests)", body, *more, *notes(runs)])


def runs_html(runs: Runs) -> str:
    """The narrow table and its notes as HTML; every text is escaped."""
    footer = "".join(f'<div class="miinb-note">{html.escape(line)}</div>' for line in notes(runs))
    title = html.escape(f"{_count(runs)}, medians over successful requests")
    more = f"<b>{SPREAD_TITLE}</b>{spread_html(runs.summary)}"
    return f'{STYLE}<div class="miinb-runs"><b>{title}</b>{table_html(narrow(runs.summary))}{more}{footer}</div>'


def spread_html(summary: pd.DataFrame) -> str:
    """The table of percentiles and what its dashes mean; "" where nothing was measured."""
    frame = spread_table(summary)
    if not len(frame):
        return ""
    return f'{table_html(frame)}<div class="miinb-note">{html.escape(few_words(frame.columns))}</div>'


def few_words(measures: Iterable[str]) -> str:
    """What the dashes of a table of percentiles of these measures mean."""
    gaps = any(name.lower().startswith("itl") for name in measures)
    return f"{FEW}{'; ITL has a sample for each gap' * gaps}."


def table_html(frame: pd.DataFrame) -> str:
    """A frame as a plain table; every text is escaped."""
    columns = [str(name) for name in frame.columns]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(map(_cell, columns, row))}</tr>" for row in frame.to_numpy().tolist())
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(column: str, value: Any) -> str:
    long = ' class="miinb-long"' * (column == "failed")  # kinds of errors: the one text that may take several lines
    return f"<td{long}>{'' if pd.isna(value) else html.escape(str(value))}</td>"


def _count(runs: Runs) -> str:
    return f"{len(runs)} run{'s' * (len(runs) != 1)}"
