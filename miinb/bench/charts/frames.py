"""What the charts read: a summary or requests from whatever frame they are given, and the words around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from miinb.bench.charts.style import BASELINES
from miinb.bench.environment import hardware_words
from miinb.bench.records import Runs
from miinb.bench.summary import encodes, summarize
from miinb.errors import InvalidValue
from miinb.wording import one_line, shortened

METRICS = {
    "e2e_s": "Time per request, end to end",
    "ttft_s": "Time to first token",
    "tpot_s": "Time per output token",
}
MOST_LEFT_OUT = 6  # points that a caption names


def requests_of(frame: Any, chart: str) -> pd.DataFrame:
    """The requests behind `frame`.

    Raises:
        InvalidValue: it is a summary (or something else) that has no single requests.
    """
    if isinstance(frame, Runs):
        return frame.requests
    if isinstance(frame, pd.DataFrame) and {"e2e_s", "status", "warmup"} <= set(frame.columns):
        return frame
    raise InvalidValue(
        f"charts.{chart}: this frame has no single requests.", hint="Give runs, or runs.requests (not runs.summary)."
    )


def summary_of(frame: Any, chart: str) -> pd.DataFrame:
    """The summary behind `frame`, with at least one measured row.

    Raises:
        InvalidValue: it is neither runs, requests nor a summary, or nothing was measured.
    """
    if isinstance(frame, Runs):
        summary = frame.summary
    elif isinstance(frame, pd.DataFrame) and {"arm", "e2e_p50_s"} <= set(frame.columns):
        summary = frame
    elif isinstance(frame, pd.DataFrame) and "e2e_s" in frame.columns:
        summary = summarize(frame)
    else:
        kind = type(frame).__name__
        raise InvalidValue(f"charts.{chart}: cannot draw a {kind}.", hint="Give runs, runs.requests or runs.summary.")
    every, summary = summary, summary[summary["n"] != 0]
    if summary.empty:
        raise InvalidValue(f"charts.{chart}: no successful request to draw.", hint="Look at runs.requests['error'].")
    summary.attrs = {**every.attrs, "all_failed": int(every["n_failed"].sum()), "left_out": _left_out(every)}
    return summary


def _left_out(every: pd.DataFrame) -> list[str]:
    """The points without an answer, and why: "optimized at concurrency 8: all 24 requests failed"."""
    found = []
    for (_, row), run in zip(every.iterrows(), run_names(every), strict=True):
        if row["n"]:
            continue
        failed, stopped = int(row["n_failed"]), int(row.get("n_cancelled", 0) or 0)
        why = f"{failed} requests failed, {stopped} were stopped" if failed and stopped else "no request was measured"
        if bool(failed) != bool(stopped):
            count = "the only request" if failed + stopped == 1 else f"all {failed + stopped} requests"
            was = "was" if failed + stopped == 1 else "were"
            why = f"{count} failed" if failed else f"{count} {was} stopped"
        found.append(f"{_point_words(row, every, str(run))}: {why}")
    return found


def _point_words(row: pd.Series, among: pd.DataFrame, run: str) -> str:
    """An arm's point, with model and run where there are several: "optimized at concurrency 8"."""
    words = [shown(row["arm"])]
    words += [short_model(row["model"])] if among["model"].nunique() > 1 else []
    words += [run] if among["run_id"].nunique() > 1 else []
    load = load_label(row)
    return ", ".join(words) + (f" at {load}" if load else "")


def require(frame: pd.DataFrame, columns: Sequence[str], chart: str, hint: str) -> pd.DataFrame:
    """The rows where one of `columns` is known.

    Raises:
        InvalidValue: none is.
    """
    known = [name for name in columns if name in frame.columns]
    rows = frame[frame[known].notna().any(axis=1)] if known else frame.iloc[:0]
    if rows.empty:
        raise InvalidValue(f"charts.{chart}: the frame has no {' or '.join(columns)}.", hint=hint)
    return rows


def require_metric(summary: pd.DataFrame, metric: str, chart: str) -> pd.DataFrame:
    """The rows of a summary that have a latency; the caption names the arms that lack it.

    Raises:
        InvalidValue: none has it.
    """
    column = f"{metric.removesuffix('_s')}_p50_s"
    others = " or ".join(repr(name) for name in METRICS if name != metric)
    rows = require(summary, [column], chart, f"Try metric={others}.")
    without = [shown(arm) for arm in dict.fromkeys(summary["arm"]) if arm not in set(rows["arm"])]
    if without:
        texts = [f"{', '.join(without)}: no {METRICS[metric].lower()}"]
        rows.attrs = {**rows.attrs, "left_out": [*rows.attrs.get("left_out", []), *texts]}
    return rows


def per_gpu(rows: pd.DataFrame, whole: str, a_gpu: str) -> tuple[pd.Series, str]:
    """Throughput and the words of its axis: `a_gpu` where all arms have GPUs, else `whole`, of the machine."""
    if (rows["n_gpus"] > 0).all():
        return rows[a_gpu], " per GPU"
    return rows[whole], ""


def objective_of(frame: pd.DataFrame, metric: str) -> float | None:
    """The limit of a latency that all runs of the frame were measured with, in seconds."""
    env = frame.attrs.get("env", {})
    found = {
        (env.get(run_id, {}).get("workload", {}).get("slo") or {}).get(metric.removesuffix("_s"))
        for run_id in frame["run_id"].dropna().unique()
    }
    return found.pop() if len(found) == 1 else None


def arms_in(frame: pd.DataFrame) -> list[str]:
    """The arms in drawing order: the baselines, then as they ran."""
    arms = list(dict.fromkeys(frame["arm"]))
    first = [name for name in BASELINES if name in arms]
    return first + [name for name in arms if name not in first]


def arm_names(frame: pd.DataFrame) -> dict[str, str]:
    """Arms as a chart can write them: in one line, short, and no two the same."""
    names: dict[str, str] = {}
    for arm in dict.fromkeys(str(arm) for arm in frame["arm"]):
        short = name = shown(arm)
        while name in names.values():
            name = f"{short} #{sum(other.startswith(short) for other in names.values()) + 1}"
        names[arm] = name
    return names


def arm_labels(frame: pd.DataFrame) -> dict[str, str]:
    """Arms as the chart names them; with the dtype where the arms' dtypes differ."""
    names = arm_names(frame)
    dtypes = {str(arm): "/".join(sorted(set(rows["dtype"].dropna()) - {""})) for arm, rows in frame.groupby("arm")}
    differ = len({dtype for dtype in dtypes.values() if dtype}) > 1
    return {
        a: f"{names[a]} ({dtype})" if differ and dtype and dtype not in a else names[a] for a, dtype in dtypes.items()
    }


def row_labels(frame: pd.DataFrame, *, gpus: bool = False) -> list[str]:
    """Each row's arm as the chart names it; with `gpus` also its GPUs, where the rows differ in them."""
    labels = arm_labels(frame)
    names = [labels[str(arm)] for arm in frame["arm"]]
    if not gpus or frame["n_gpus"].nunique() < 2:
        return names
    return [f"{name}, {gpu_words(int(count))}" for name, count in zip(names, frame["n_gpus"], strict=True)]


def gpu_words(count: int) -> str:
    """How many GPUs: "no GPU", "1 GPU", "4 GPUs"."""
    return f"{count} GPU{'s' * (count != 1)}" if count else "no GPU"


def shown(name: object) -> str:
    """A name in one line of at most 32 characters; "(no name)" of none."""
    return shortened(one_line(str(name))) or "(no name)"


def legend_text(name: str) -> str:
    """The name for a legend: matplotlib leaves out those that begin with "_"."""
    return f"\u200b{name}" if name.startswith("_") else name


def load_label(row: Mapping[str, Any] | pd.Series) -> str:
    """A point's load in words: "concurrency 8", "2.5 requests/s"."""
    if pd.notna(row["rate_rps"]):
        return f"{row['rate_rps']:g} requests/s"
    return f"concurrency {row['concurrency']:.0f}" if pd.notna(row["concurrency"]) else ""


def categories(frame: pd.DataFrame) -> pd.Series:
    """A label a row that tells its group of bars: what varies of model, load and run."""
    parts = []
    if frame["model"].nunique() > 1:
        parts.append(frame["model"].map(short_model))
    if frame["task"].nunique() > 1 and encoding(frame):
        parts.append(frame["task"])
    loads = frame.apply(load_label, axis=1)
    if loads.nunique() > 1:
        parts.append(loads)
    same = pd.DataFrame({"arm": frame["arm"], "model": frame["model"], "task": frame["task"], "load": loads})
    if same.duplicated().any():
        parts.append(run_names(frame))
    if not parts:
        return pd.Series("", index=frame.index)
    labels = parts[0].astype(str)
    for part in parts[1:]:
        labels = labels + "\n" + part.astype(str)
    return labels


def run_names(frame: pd.DataFrame) -> pd.Series:
    """What each row's run is called: its name, else its id, and both where two runs have one name."""
    names = frame["name"].fillna(frame["run_id"]).astype(str)
    alike = frame["run_id"].groupby(names).transform("nunique") > 1
    short = names.map(shown)
    return short.where(~alike, short + " " + frame["run_id"].astype(str).map(shown))


def short_model(model: object) -> str:
    """A hub name without its owner."""
    return one_line(str(model).rsplit("/", 1)[-1])


def subtitle(frame: pd.DataFrame) -> str:
    """What all rows share: model, dtype, lengths, load."""
    parts = []
    for name, text in (("model", short_model), ("dtype", str)):
        values = [value for value in frame[name].dropna().unique() if value]
        parts += [text(values[0])] if len(values) == 1 else []
    prompts, new = frame["prompt_tokens"].dropna(), frame["new_tokens"].dropna()
    if encoding(frame):
        parts += [str(task) for task in frame["task"].unique()] if frame["task"].nunique() == 1 else []
        parts += [f"{prompts.iloc[0]:.0f} tokens a request"] if prompts.nunique() == 1 else []
    elif prompts.nunique() == 1 and new.nunique() == 1:
        parts.append(f"{prompts.iloc[0]:.0f} prompt + {new.iloc[0]:.0f} new tokens")
    elif new.nunique() == 1:
        parts.append(f"{new.iloc[0]:.0f} new tokens")
    loads = {load_label(row) for _, row in frame.iterrows()} - {""}
    return " · ".join([*parts, *(loads if len(loads) == 1 else ())])


def caption(frame: pd.DataFrame, what: str) -> list[str]:
    """Lines below a chart: what is drawn, n and failures, whether the outputs are equal, warnings."""
    counts = sorted({int(n) for n in frame["n"].dropna()}) or [0]
    failed = frame.attrs.get("all_failed", int(frame["n_failed"].sum()))
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    n += " request" if counts == [1] else " requests"
    lines = [f"{what}; {n} a bar or point, {failed} failed." if what else f"{n}, {failed} failed."]
    left_out = frame.attrs.get("left_out", [])
    more = [f"and {len(left_out) - MOST_LEFT_OUT} more"] if len(left_out) > MOST_LEFT_OUT else []
    lines += [f"Left out: {'; '.join([*left_out[:MOST_LEFT_OUT], *more])}."] if left_out else []
    lines += outputs_words(frame)
    lines += frame.attrs.get("notes", [])
    cached = frame[frame["cached_share"] > 0.01] if "cached_share" in frame.columns else frame.iloc[:0]
    shares: dict[str, list[str]] = {}
    for arm, rows in cached.groupby(cached["arm"].astype(str), sort=False):
        shares.setdefault(f"{rows['cached_share'].max():.0%}", []).append(shown(arm))
    lines += [f"{', '.join(arms)}: {s} of the prompt tokens came from the prefix cache." for s, arms in shares.items()]
    for run_id in dict.fromkeys(frame["run_id"].dropna()):
        for text in frame.attrs.get("env", {}).get(run_id, {}).get("warnings", ()):
            lines.append(f"Note: {text}.")
    return lines


def outputs_words(frame: pd.DataFrame) -> list[str]:
    """Whether the arms' answers are the reference's, one line for all arms of which the same is true."""
    if frame["arm"].nunique() < 2:
        return []
    compared = frame[frame["n_compared"].fillna(0) > 0] if "n_compared" in frame.columns else frame.iloc[:0]
    if compared.empty:
        return ["Answers of the arms were not compared."]
    arms = list(frame["arm"])
    reference = (
        "baseline"
        if "baseline" in arms
        else next((arm for arm in arms if arm not in set(compared["arm"])), "the reference")
    )
    texts: dict[str, list[str]] = {}
    for arm, rows in compared.groupby("arm", sort=False):
        total = int(rows["n_compared"].sum())
        share = float((rows["equal_share"] * rows["n_compared"]).sum()) / total
        equal = rows["n_equal"].sum(min_count=1)
        encoded = encoding(rows)
        alike = f"{share:.0%} of the labels" if encoded else f"the first {share:.0%} of the tokens"
        what = "the same" if encoded else "the same text"
        words = f"on average {alike} are {reference}'s ({total} answers)"
        if share == 1:
            words = f"all {'labels' if encoded else 'tokens'} are {reference}'s ({total} answers)"
        if pd.notna(equal):
            words = f"{'all' if equal == total else f'{equal:.0f} of'} {total} answers are {what} as {reference}'s"
            words += "" if equal == total else f"; on average {alike} are equal"
        texts.setdefault(words, []).append(shown(arm))
    return [f"{', '.join(arms)}: {words}." for words, arms in texts.items()]


def encoding(frame: pd.DataFrame) -> bool:
    """Whether these are runs of encoder tasks alone."""
    return bool(len(frame)) and all(encodes(str(task)) for task in frame["task"].unique())


def footer(frame: pd.DataFrame) -> str:
    """Hardware, versions, run ids: who wants to repeat the figures needs them."""
    env = frame.attrs.get("env", {})
    run_ids = [str(run_id) for run_id in dict.fromkeys(frame["run_id"].dropna())]
    hosts = [env.get(run_id, {}).get("host", {}) for run_id in run_ids]
    words = list(dict.fromkeys(text for text in (hardware_words(host) for host in hosts if host) if text))
    names = ("miinb", "torch", "transformers")
    versions = [f"{n} {hosts[-1]['versions'][n]}" for n in names if hosts and n in hosts[-1].get("versions", {})]
    runs = f"run {run_ids[0]}" if len(run_ids) == 1 else f"{len(run_ids)} runs" if run_ids else ""
    return " · ".join([*words, *versions, *([runs] if runs else [])])
