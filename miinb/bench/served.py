"""Served speed: a model behind its server, optimized against plain transformers, one request at a time and several.

`python -m miinb.bench.served MODEL` starts both arms for each dtype, lets them take turns on the same prompts with the
same number of new tokens, and prints the table, and under it what a user asks: how much faster is one answer, and how
much sooner are N answers there when they are asked for at once instead of one after another from the baseline.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pandas as pd

from miinb.bench.records import Runs
from miinb.bench.runner import compare
from miinb.bench.workload import STORY_PROMPTS
from miinb.session import Session


def measure(model: str, dtype: str, *, at_once: int, new_tokens: int, requests: int, check: str) -> Runs:
    """Both arms of one dtype, at concurrency 1 and `at_once`; their processes are gone when it returns."""
    with (
        Session(model, "text-generation", engine="baseline", dtype=dtype) as baseline,
        Session(model, "text-generation", dtype=dtype) as optimized,
    ):
        return compare(
            [baseline, optimized],
            STORY_PROMPTS,
            requests=requests,
            new_tokens=new_tokens,
            concurrency=[1, at_once],
            warmup=2,
            check=check,
        )


def at_once_ratio(runs: Runs) -> float:
    """Tokens a second of the optimized arm under the most concurrency over those of one baseline call after another."""
    table: pd.DataFrame = runs.summary
    alone = table[(table["arm"] == "baseline") & (table["concurrency"] == 1)]["output_tok_s"]
    optimized = table[table["arm"] == "optimized"].sort_values("concurrency")["output_tok_s"]
    return float(optimized.iloc[-1] / alone.iloc[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and store the runs if asked."""
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.served", description=__doc__)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--at-once", type=int, default=8, help="concurrent requests of the second point")
    parser.add_argument("--requests", type=int, default=16, help="of each arm and point")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", help="folder to append the runs to (miinb.load_runs reads it)")
    args = parser.parse_args(argv)
    for dtype in args.dtypes:
        runs = measure(
            args.model,
            dtype,
            at_once=args.at_once,
            new_tokens=args.new_tokens,
            requests=args.requests,
            check="exact" if dtype == "fp32" else "close",
        )
        print(runs)
        print(
            f"{dtype}: {args.at_once} requests at once, optimized, have {at_once_ratio(runs):.1f}x the tokens/s of the "
            f"baseline's one after another\n"
        )
        if args.out:
            runs.save(args.out)


if __name__ == "__main__":
    main()
