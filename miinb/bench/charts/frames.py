"""What the charts read: a summary or requests from whatever frame they are given, and the words around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from miinb.bench.charts import names
from miinb.bench.charts.measures import METRICS
from miinb.bench.environment import differences, hardware_words, version_words
from miinb.bench.pixels import psnr_words
from miinb.bench.records import REQUEST_COLUMNS, Runs, requests_frame
from miinb.bench.summary import SUMMARY_COLUMNS, summarize
from miinb.errors import InvalidValue

MOST_LEFT_OUT = 6  # points that a caption names


def requests_of(frame: Any, chart: str) -> pd.DataFrame:
    """The requests behind `frame`.

    Raises:
        InvalidValue: it is a summary (or something else) that has no single requests.
    """
    if isinstance(frame, Runs):
        return frame.requests
    if isinstance(frame, pd.DataFrame) and "e2e_s" in frame.columns:
        return _whole(frame, chart)
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
        summary = _whole_summary(frame)
    elif isinstance(frame, pd.DataFrame) and "e2e_s" in frame.columns:
        summary = summarize(_whole(frame, chart))
    else:
        kind = type(frame).__name__
        raise InvalidValue(f"charts.{chart}: cannot draw a {kind}.", hint="Give runs, runs.requests or runs.summary.")
    every, summary = summary, summary[summary["n"] != 0]
    if summary.empty:
        raise InvalidValue(f"charts.{chart}: no successful request to draw.", hint="Look at runs.requests['error'].")
    summary.attrs = {**every.attrs, "all_failed": int(every["n_failed"].sum()), "left_out": _left_out(every)}
    return summary


def _whole(frame: pd.DataFrame, chart: str) -> pd.DataFrame:
    """A frame of requests with every column; of what a user made, those that are missing are as for one run.

    Raises:
        InvalidValue: there are no arms, or a time is no number.
    """
    if set(REQUEST_COLUMNS) <= set(frame.columns):
        return frame
    if "arm" not in frame.columns or frame["arm"].isna().any():
        raise InvalidValue(f"charts.{chart}: which arm is a request of?", hint="The column 'arm' names it in each row.")
    made = frame.replace([math.inf, -math.inf], math.nan).assign(arm=frame["arm"].astype(str))
    for name in ({"run_id", "seq"} & {*REQUEST_COLUMNS}) - {*frame.columns}:
        made[name] = "run" if name == "run_id" else range(len(frame))
    try:
        rows: Any = made.to_dict("records")
        return requests_frame(rows, frame.attrs.get("env", {}))
    except (ValueError, TypeError) as error:
        raise InvalidValue(f"charts.{chart}: these are no requests: {error}.") from None


def _whole_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame of a summary with every column; those that are missing are as for one run."""
    usual: dict[str, Any] = {"run_id": "run", "model": "", "task": "", "dtype": "", "n": 1, "n_failed": 0}
    usual |= {name: math.nan for name in SUMMARY_COLUMNS if name not in usual}
    missing = {name: value for name, value in usual.items() if name not in frame.columns}
    summary = pd.concat([frame, pd.DataFrame(missing, index=frame.index)], axis=1)
    summary.attrs = dict(frame.attrs)
    return summary


def _left_out(every: pd.DataFrame) -> list[str]:
    """The points without an answer, and why: "optimized at concurrency 8: all 24 requests failed"."""
    found = []
    for (_, row), run in zip(every.iterrows(), names.run_names(every), strict=True):
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
    words = [names.shown(row["arm"])]
    words += [names.short_model(row["model"])] if among["model"].nunique() > 1 else []
    words += [run] if among["run_id"].nunique() > 1 else []
    load = names.load_label(row)
    return ", ".join(words) + (f" at {load}" if load else "")


def require(frame: pd.DataFrame, columns: Sequence[str], chart: str, hint: str, what: str = "") -> pd.DataFrame:
    """The rows where one of `columns` is known; with `what` the caption names those that lack it.

    Raises:
        InvalidValue: none is.
    """
    known = [name for name in columns if name in frame.columns]
    there = frame[known].notna().any(axis=1) if known else pd.Series(False, index=frame.index)
    if not there.any():
        raise InvalidValue(f"charts.{chart}: the frame has no {' or '.join(columns)}.", hint=hint)
    rows = frame[there]
    if what and not there.all():
        rows.attrs = {**rows.attrs, "left_out": [*rows.attrs.get("left_out", []), *_without(frame, there, what)]}
    return rows


def _without(frame: pd.DataFrame, there: pd.Series, what: str) -> list[str]:
    """What is left out for want of a value: arms that never have it, and the points of those that sometimes do."""
    having = set(frame.loc[there, "arm"])
    never = [names.shown(arm) for arm in dict.fromkeys(frame["arm"]) if arm not in having]
    found = [f"{', '.join(never)}: no {what}"] if never else []
    for (_, row), run, known in zip(frame.iterrows(), names.run_names(frame), there, strict=True):
        if not known and row["arm"] in having:
            found.append(f"{_point_words(row, frame, str(run))}: no {what}")
    return found


def require_metric(summary: pd.DataFrame, metric: str, chart: str) -> pd.DataFrame:
    """The rows of a summary that have a latency; the caption names the points that lack it.

    Raises:
        InvalidValue: none has it.
    """
    column = f"{metric.removesuffix('_s')}_p50_s"
    others = " or ".join(repr(name) for name in METRICS if name != metric)
    what = METRICS[metric][:1].lower() + METRICS[metric][1:]
    return require(summary, [column], chart, f"Try metric={others}.", what)


def objective_of(frame: pd.DataFrame, metric: str) -> float | None:
    """The limit of a latency that all runs of the frame were measured with, in seconds."""
    env = frame.attrs.get("env", {})
    found = {
        (env.get(run_id, {}).get("workload", {}).get("slo") or {}).get(metric.removesuffix("_s"))
        for run_id in frame["run_id"].dropna().unique()
    }
    return found.pop() if len(found) == 1 else None


def subtitle(frame: pd.DataFrame) -> str:
    """What all rows share: model, dtype, lengths, load."""
    parts = []
    for name, text in (("model", names.short_model), ("dtype", str)):
        values = [value for value in frame[name].dropna().unique() if value]
        parts += [text(values[0])] if len(values) == 1 else []
    prompts, new = frame["prompt_tokens"].dropna(), frame["new_tokens"].dropna()
    if names.picturing(frame):
        parts += _picture_words(frame)
    elif names.encoding(frame):
        parts += [str(task) for task in frame["task"].unique()] if frame["task"].nunique() == 1 else []
        parts += [f"{prompts.iloc[0]:.0f} tokens a request"] if prompts.nunique() == 1 else []
    elif prompts.nunique() == 1 and new.nunique() == 1:
        parts.append(f"{prompts.iloc[0]:.0f} prompt + {new.iloc[0]:.0f} new tokens")
    elif new.nunique() == 1:
        parts.append(f"{new.iloc[0]:.0f} new tokens")
    loads = {names.load_label(row) for _, row in frame.iterrows()} - {""}
    return " · ".join([*parts, *(loads if len(loads) == 1 else ())])


def _picture_words(frame: pd.DataFrame) -> list[str]:
    """What all pictures share: "512 x 512", "50 steps", "guidance 7.5"."""
    found = []
    sides = frame[["width_px", "height_px"]].dropna().drop_duplicates()
    if len(sides) == 1:
        found.append(f"{sides['width_px'].iloc[0]:.0f} x {sides['height_px'].iloc[0]:.0f}")
    for name, words in (("steps", "{:g} steps"), ("guidance", "guidance {:g}")):
        values = frame[name].dropna()
        found += [words.format(values.iloc[0])] if values.nunique() == 1 else []
    return found


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
    lines += differences(_hosts(frame))
    lines += _cached_words(frame)
    for run_id in dict.fromkeys(frame["run_id"].dropna()):
        for text in frame.attrs.get("env", {}).get(run_id, {}).get("warnings", ()):
            lines.append(f"Note: {text}.")
    return lines


def _cached_words(frame: pd.DataFrame) -> list[str]:
    """How much of each arm's prompts, of all its loads together, came from the prefix cache."""
    known = frame[frame["cached_share"].notna()] if "cached_share" in frame.columns else frame.iloc[:0]
    shares: dict[str, list[str]] = {}
    for arm, rows in known.groupby(known["arm"].astype(str), sort=False):
        tokens = rows["n"] * rows.get("prompt_tokens", 1)
        share = float((rows["cached_share"] * tokens).sum() / tokens.sum())
        if share > 0.01:
            shares.setdefault(f"{share:.0%}", []).append(names.shown(arm))
    return [f"{', '.join(arms)}: {s} of the prompt tokens came from the prefix cache." for s, arms in shares.items()]


def outputs_words(frame: pd.DataFrame) -> list[str]:
    """Whether the arms' answers are the reference's, one line for all arms of which the same is true."""
    if frame["arm"].nunique() < 2:
        return []
    compared = frame[frame["n_compared"].fillna(0) > 0] if "n_compared" in frame.columns else frame.iloc[:0]
    if compared.empty:
        return _next_words(frame) or ["Answers of the arms were not compared."]
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
        encoded = names.encoding(rows)
        alike = f"{share:.0%} of the labels" if encoded else f"the first {share:.0%} of the tokens"
        what = "the same" if encoded else "the same text"
        words = f"on average {alike} are {reference}'s ({total} answers)"
        if names.picturing(rows):
            texts.setdefault(_likeness(rows, reference, total), []).append(names.shown(arm))
            continue
        if share == 1:
            words = f"all {'labels' if encoded else 'tokens'} are {reference}'s ({total} answers)"
        if pd.notna(equal):
            words = f"{'all' if equal == total else f'{equal:.0f} of'} {total} answers are {what} as {reference}'s"
            words += "" if equal == total else f"; on average {alike} are equal"
        texts.setdefault(words, []).append(names.shown(arm))
    return [f"{', '.join(arms)}: {words}." for words, arms in texts.items()]


def _likeness(rows: pd.DataFrame, reference: str, total: int) -> str:
    """How far an arm's pictures are from the reference's."""
    worst = float(rows["psnr_db"].min())
    if math.isnan(worst):
        return f"pictures have other sizes than {reference}'s ({total} requests)"
    if math.isinf(worst):
        return f"all pictures are identical to {reference}'s ({total} requests)"
    return (
        f"pictures differ from {reference}'s of the same seeds by at most {rows['max_abs_diff'].max():g} of 255, PSNR "
        f"{psnr_words(worst)} and more ({total} requests)"
    )


def _next_words(frame: pd.DataFrame) -> list[str]:
    """On how many places of a text the arms' likeliest next token is the unquantized arm's, where that was measured."""
    if "same_next" not in frame.columns:
        return []
    labels = [names.joined(names.shown(arm), of) for arm, of in zip(frame["arm"], names.categories(frame), strict=True)]
    shares = [f"{label} {share:.1%}" for label, share in zip(labels, frame["same_next"], strict=True) if share < 1]
    return [f"Likeliest next token as unquantized: {', '.join(shares)} of the text's places."] if shares else []


def footer(frame: pd.DataFrame) -> str:
    """Hardware, versions, run ids: who wants to repeat the figures needs them."""
    run_ids = [str(run_id) for run_id in dict.fromkeys(frame["run_id"].dropna())]
    hosts = [host for host in _hosts(frame).values() if host]
    words = list(dict.fromkeys(text for text in map(hardware_words, hosts) if text))
    library = "diffusers" if names.picturing(frame) else "transformers"
    versions = version_words(hosts, ("miinb", "torch", library))
    runs = f"run {run_ids[0]}" if len(run_ids) == 1 else f"{len(run_ids)} runs" if run_ids else ""
    return " · ".join([*words, *versions, *([runs] if runs else [])])


def _hosts(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """What each run of the frame ran on, by the run's name."""
    known = frame[frame["run_id"].notna()]
    env = frame.attrs.get("env", {})
    return {
        str(name): env.get(str(run_id), {}).get("host") or {}
        for name, run_id in dict(zip(names.run_names(known), known["run_id"], strict=True)).items()
    }
