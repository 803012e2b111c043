"""`python -m miinb.bench.encoders`: run suites of encoders, print the table, write the runs, draw them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from miinb.bench import presets
from miinb.bench.encoders import figures
from miinb.bench.encoders.measuring import choose, measure
from miinb.bench.encoders.suites import HEADS, LABELS, SUITES, Sizes
from miinb.bench.encoders.table import table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = _parser().parse_args(arguments)
    if options.charts:
        for path in figures.write(options.charts, published=options.published):
            print(path)
        return
    sizes = tuple(field.name for field in dataclasses.fields(Sizes))
    names = ("device", "dtype", "quick", "tiny", "models", "tasks", "arms", *sizes)
    asked = {name: found for name in names if (found := getattr(options, name, None)) is not None}
    choice = choose(options.suite or (), **asked)
    runs = measure(choice, out=options.out, budget_s=options.budget_s, say=lambda text: print(text, flush=True))
    print(f"\n{table(runs)}\n\nRecords: {options.out}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.encoders", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="default: those of the device")
    parser.add_argument("--models", nargs="+", choices=presets.ENCODERS, help="default: those of each suite")
    parser.add_argument("--tasks", nargs="+", choices=HEADS, help="default: those of each suite")
    parser.add_argument("--arms", nargs="+", choices=LABELS, help="default: all of each suite")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: fp16; fp32 on a CPU")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, tasks and sizes of batches")
    parser.add_argument("--tiny", action="store_true", help="tiny models and lengths: shows that everything runs")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="no arm starts after so many seconds")
    parser.add_argument("--tokens", type=int, help="of a text, or of the longest (128)")
    parser.add_argument("--texts", type=int, help="throughput, mixed: at once (4096; 256 on a CPU)")
    parser.add_argument("--mean", type=float, help="mixed: mean length over the longest (0.4)")
    parser.add_argument("--batches", type=int, nargs="+", help="that the baseline tries (32 to 1024)")
    parser.add_argument("--clients", type=int, help="at once (64)")
    parser.add_argument("--seconds", type=float, help="that the clients ask for (8)")
    parser.add_argument("--repeats", type=int, help="measured requests, one at a time (100; at most 15 on a CPU)")
    parser.add_argument("--passes", type=int, help="measured passes over texts that come together (5)")
    parser.add_argument("--warmup", type=int, help="requests before them (20)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--charts", type=Path, metavar="RUNS", help="draw the runs in this directory, measure nothing")
    parser.add_argument("--published", action="store_true", help="charts: MII's figures of 2022 beside the measured")
    parser.add_argument("--out", type=Path, default=Path("encoder-runs"), help="directory of the records")
    return parser


if __name__ == "__main__":
    main()
