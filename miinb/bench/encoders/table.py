"""The result as text: a table for each suite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from miinb.bench.environment import hardware_words
from miinb.bench.records import NAN, Runs
from miinb.bench.summary import ratio_text
from miinb.wording import number, size_words

#: Suites whose figure is a rate; the others' is the time of a request.
RATES = {"throughput": "sequences/s", "mixed": "tokens/s", "clients": "requests/s", "embeddings": "texts/s"}


def table(runs: Runs) -> str:
    """Every run's arms: times or rates, ratios to the baseline, percent of the floor, whether the answers agree."""
    if not runs.env:
        return "Nothing was measured."
    parts = [_head(runs)]
    for suite in dict.fromkeys(env["suite"] for env in runs.env.values()):
        ids = [run_id for run_id, env in runs.env.items() if env["suite"] == suite]
        rows = [_row(suite, runs.env[run_id], row, base) for run_id in ids for row, base in arms(runs, run_id)]
        frame = pd.DataFrame(rows).fillna("")
        frame = frame[[name for name in frame.columns if (frame[name] != "").any()]]
        parts.append(f"{suite}: {work(runs.env[ids[0]])}\n{frame.to_string(index=False)}")
        parts += [f"note: {runs.env[run_id]['name']}: {text}" for run_id in ids for text in notes(runs.env[run_id])]
    return "\n\n".join(parts)


def arms(runs: Runs, run_id: str) -> list[tuple[pd.Series, pd.Series | None]]:
    """The run's rows of the summary, baselines first, each with the row of the arm "baseline" (None: it failed)."""
    rows = runs.summary[runs.summary["run_id"] == run_id]
    found = rows[(rows["arm"] == "baseline") & (rows["n"] > 0)]
    base = None if found.empty else found.iloc[0]
    ranked = rows.sort_values("arm", key=lambda names: ~names.str.startswith("baseline"), kind="stable")
    return [(row, base) for _, row in ranked.iterrows()]


def value(suite: str, row: pd.Series) -> float:
    """What a suite measures of an arm: a rate, or the median seconds of a request."""
    name = {"throughput": "seq_s", "mixed": "total_tok_s", "clients": "req_s", "embeddings": "seq_s"}.get(suite)
    return float(row[name or "e2e_p50_s"])


def ratio(suite: str, row: pd.Series, base: pd.Series | None) -> float:
    """How many times better than the baseline; NaN for itself or without one."""
    if base is None or row["arm"] == "baseline":
        return NAN
    mine, theirs = value(suite, row), value(suite, base)
    return mine / theirs if suite in RATES else theirs / mine


def floor_share(suite: str, facts: Mapping[str, Any], row: pd.Series) -> float:
    """The least time of a request over its own; NaN where the suite has no floor.

    On a CPU the floor is that of fp32's products: other precisions have instructions that go below it, and none here.
    """
    if facts.get("device") == "cpu" and row["dtype"] != "fp32":
        return NAN
    return float(facts.get("floor_s") or NAN) / float(row["e2e_p50_s"])


def _row(suite: str, env: Mapping[str, Any], row: pd.Series, base: pd.Series | None) -> dict[str, str]:
    facts = env["arms"].get(row["arm"], {})
    cells = {"model": str(row["model"]), "task": str(row["task"]), "arm": str(row["arm"]), "dtype": str(row["dtype"])}
    if facts.get("error"):
        return cells | {"note": "failed"}
    times = ratio(suite, row, base)
    cells |= {
        RATES.get(suite, "ms"): number(value(suite, row) * (1.0 if suite in RATES else 1e3), ""),
        "ratio": ratio_text(times) if math.isfinite(times) else "",
    }
    if suite in ("served", "clients"):
        parts = {"pre": "preprocess", "queue": "queue", "model": "model", "post": "postprocess"}
        cells |= {f"{word} ms": number(row[f"{part}_p50_s"] * 1e3, "") for word, part in parts.items()}
    elif suite in ("latency", "cpu"):
        cells["model ms"] = number(row["model_p50_s"] * 1e3, "")
    if suite == "clients":
        cells |= {"p50 ms": number(row["e2e_p50_s"] * 1e3, ""), "p95 ms": number(row["e2e_p95_s"] * 1e3, "")}
    share = floor_share(suite, facts, row)
    return cells | {
        "% of floor": f"{share:.0%}" if math.isfinite(share) else "",
        "batch": str(facts.get("static_batch", "")),
        "same answer": same(row),
        "numbers apart": f"{facts['value_error']:.1e}" if "value_error" in facts else "",
    }


def same(row: pd.Series) -> str:
    """Of how many requests the answer was the baseline's."""
    if not row["n_compared"]:
        return ""
    if row["n_equal"] == row["n_compared"]:
        return "yes"
    return f"{row['n_equal']:.0f} of {row['n_compared']:.0f} ({row['equal_share']:.1%} of choices)"


def notes(env: Mapping[str, Any]) -> list[str]:
    """What a reader of a run's figures must know."""
    found = list(env["warnings"])
    for arm, facts in env["arms"].items():
        if len(facts.get("tried_seq_s", ())) > 1:
            tried = ", ".join(f"{name} {number(rate)}/s" for name, rate in facts["tried_seq_s"].items())
            found.append(f"{arm}: {tried}")
        if "client_processes" in facts:
            found.append(f"{arm}: asked by {facts['client_processes']} processes on {facts['cores']} cores")
        if "cosine" in facts:
            found.append(f"{arm}: cosine with the baseline's embeddings at least {facts['cosine']:.5f}")
    return found


def _head(runs: Runs) -> str:
    env = next(iter(runs.env.values()))
    words = [hardware_words(env.get("host", {})), "random weights"]
    for device, found in env.get("rates", {}).items():
        words.append(
            f"{device}: copies move {size_words(found['copy_bytes_s'])}/s, "
            f"matrix products {number(found['matmul_flop_s'] / 1e12)} Tflop/s"
        )
    return "; ".join(words)


def work(env: Mapping[str, Any]) -> str:
    """A run's workload in words."""
    asked = env.get("workload", {})
    least, mean, most = asked.get("tokens", ("?", "?", "?"))
    lengths = f"{most} tokens" if least == most else f"{least} to {most} tokens (mean {mean})"
    if asked.get("clients", 1) > 1:
        return f"{asked['clients']} clients at once, one text of {lengths} a request"
    return f"{asked['texts']} texts at once, {lengths} each" if asked.get("texts", 1) > 1 else f"one text, {lengths}"
