"""The result as text: a table for each kind of suite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from miinb.bench.environment import hardware_words
from miinb.bench.records import NAN, Runs
from miinb.bench.summary import ratio_text
from miinb.wording import number, size_words

#: Suites of which all requests come at once.
AT_ONCE = ("throughput", "ragged")
#: What a server may add to a token: this share of the engine's time, or so many seconds, whichever is more.
SERVER_SHARE, SERVER_S = 0.10, 0.15e-3


def table(runs: Runs) -> str:
    """Every run's arms: time per token or tokens a second, ratios to the baseline, percent of the floor."""
    if not runs.env:
        return "Nothing was measured."
    parts = [_head(runs)]
    summary = runs.summary
    for suite in dict.fromkeys(env["suite"] for env in runs.env.values()):
        ids = [run_id for run_id, env in runs.env.items() if env["suite"] == suite]
        rows = [_row(suite, runs.env[run_id], group) for run_id in ids for _, group in _arms(summary, run_id, suite)]
        frame = pd.DataFrame(rows).fillna("")
        body = frame.to_string(index=False) if len(frame) else "nothing was measured"
        parts.append(f"{suite}: {lengths(runs.env[ids[0]])}\n{body}")
        parts += [f"note: {runs.env[run_id]['model']}: {text}" for run_id in ids for text in _notes(runs, run_id)]
    return "\n\n".join(parts)


def _arms(summary: pd.DataFrame, run_id: str, suite: str = "") -> list[tuple[str, pd.Series]]:
    """The run's rows of the summary, baselines first, each with the row that it is compared with as `_baseline`."""
    rows = summary[summary["run_id"] == run_id]
    baseline = rows[rows["arm"] == ("optimized" if suite == "quantized" else "baseline")]
    found = []
    for _, row in rows.sort_values("arm", key=lambda arms: ~arms.str.startswith("baseline"), kind="stable").iterrows():
        row["_baseline"] = None if baseline.empty else baseline.iloc[0]
        found.append((str(row["arm"]), row))
    return found


def _row(suite: str, env: Mapping[str, Any], row: pd.Series) -> dict[str, str]:
    facts, base = env["arms"].get(row["arm"], {}), row["_baseline"]
    cells = {"model": str(row["model"]), "arm": str(row["arm"]), "dtype": str(row["dtype"])}
    if facts.get("error"):
        return cells | {"note": "failed"}
    first = {"TTFT ms": number(row["ttft_p50_s"] * 1e3, ""), "TTFT ratio": _ratio(base, row, "ttft_p50_s")}
    if suite == "memory":
        weights, peak = facts.get("weights_bytes") or NAN, facts.get("load_peak_bytes") or NAN
        return cells | {
            "weights GB": number(weights / 1e9, ""),
            "peak at load GB": number(peak / 1e9, ""),
            "of weights": number(peak / weights, ""),
            "KV GB": number((facts.get("kv_cache_bytes") or NAN) / 1e9, ""),
            "planned GB": number((facts.get("kv_planned_bytes") or NAN) / 1e9, ""),
            "loading s": number(facts.get("load_s") or NAN, ""),
        }
    if suite in AT_ONCE:
        rate, floor = tok_s(env, row), facts.get("floor_tok_s") or NAN
        ratio = rate / tok_s(env, base) if base is not None and row["arm"] != "baseline" else NAN
        return cells | {
            "requests": str(facts.get("requests", "")),
            "tokens/s": number(rate, ""),
            "ratio": ratio_text(ratio) if math.isfinite(ratio) else "",
            **first,
            "% of floor": _percent(rate / floor),
        }
    floor = facts.get("floor_s") or NAN
    return cells | {
        **first,
        "ms/token": number(row["tpot_p50_s"] * 1e3, ""),
        "ratio": _ratio(base, row, "tpot_p50_s"),
        "% of floor": _percent(floor / row["tpot_p50_s"]),
        "floor ms": number(floor * 1e3, ""),
    }


def tok_s(env: Mapping[str, Any], row: pd.Series) -> float:
    """Output tokens a second of an arm; those of a pass that was cut count too."""
    facts = env["arms"].get(row["arm"], {})
    return float(facts.get("output_tok_s") or row["output_tok_s"])


def _notes(runs: Runs, run_id: str) -> list[str]:
    env = runs.env[run_id]
    notes = list(env["warnings"])
    for arm, facts in env["arms"].items():
        if "tried_tok_s" in facts:
            notes.append(
                f"{arm}: {', '.join(f'{name} {number(rate)}/s' for name, rate in facts['tried_tok_s'].items())}"
            )
    times = {arm: float(row["tpot_p50_s"]) for arm, row in _arms(runs.summary, run_id)}
    if "served" in times and "optimized" in times:
        engine, more = times["optimized"], times["served"] - times["optimized"]
        most = max(SERVER_SHARE * engine, SERVER_S)
        notes.append(
            f"the server adds {more * 1e3:.3f} ms a token ({more / engine:.1%}); "
            f"{'within' if more <= most else 'above'} {most * 1e3:.3f} ms"
        )
    return notes


def _head(runs: Runs) -> str:
    env = next(iter(runs.env.values()))
    rates = env.get("rates", {})
    words = [hardware_words(env.get("host", {})), "random weights, greedy"]
    for device, found in rates.items():
        words.append(
            f"{device}: copies move {size_words(found['copy_bytes_s'])}/s, "
            f"matrix products {found['matmul_flop_s'] / 1e12:,.1f} Tflop/s"
        )
    return "; ".join(words)


def lengths(env: Mapping[str, Any]) -> str:
    """A run's workload in words."""
    workload = env.get("workload", {})
    prompts, news = workload.get("prompt_tokens"), workload.get("new_tokens")
    how = f"{workload.get('requests')} requests at once" if workload.get("at_once") else "one request at a time"
    return f"{how}, {_span(prompts)} prompt + {_span(news)} new tokens"


def _span(pair: Any) -> str:
    low, high = pair or ("?", "?")
    return f"{low}" if low == high else f"{low} to {high}"


def _ratio(base: pd.Series | None, row: pd.Series, name: str) -> str:
    if base is None or row["arm"] in ("baseline", base["arm"]) or not row[name] > 0:
        return ""
    ratio = float(base[name]) / float(row[name])
    return ratio_text(ratio) if math.isfinite(ratio) else ""


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else ""
