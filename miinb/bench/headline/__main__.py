"""`python -m miinb.bench.headline`: run suites, print the table, write the runs, draw them."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from miinb import hardware
from miinb.bench import presets
from miinb.bench.headline import figures
from miinb.bench.headline.behind_server import served
from miinb.bench.headline.isolation import Worker
from miinb.bench.headline.running import Say, run_jobs
from miinb.bench.headline.suites import (
    ARMS,
    DEFAULT_SUITES,
    FP8_CACHE_SUITES,
    QUICK,
    SUITES,
    TINY,
    Choice,
    Job,
    Sizes,
    jobs,
    models_of,
)
from miinb.bench.headline.table import table
from miinb.bench.headline.trace import Measured
from miinb.bench.records import Runs


def measure(choice: Choice, *, out: Path, budget_s: float = float("inf"), tiny: bool = False, say: Say = print) -> Runs:
    """Run every job of a choice, one after another; arms that fail or find no time are said in their runs.

    Args:
        choice: suites, models, arms, sizes.
        out: directory that gets a folder a run, written as soon as an arm has ended.
        budget_s: no job starts after so many seconds.
        tiny: models of the same families with a few thousand weights, to show that everything runs.
        say: told what is going on.
    """
    worker = Worker()

    def run(job: Job, rates: Any) -> Iterator[Measured]:
        if not job.arm.served:
            yield from worker.run(job, rates)
            return
        worker.close()  # the server needs its GPU memory
        yield from served(job)

    with tempfile.TemporaryDirectory(prefix="miinb-headline-") as place:
        folders = {name: str(presets.write_into(place, name, small=tiny)) for name in models_of(choice)}
        return run_jobs(
            *(jobs(choice, folders), worker, run),
            dtype=choice.dtype,
            small=tiny,
            out=out,
            budget_s=budget_s,
            name=lambda job: job.model,
            words=_words,
            say=say,
        )


def _words(found: Measured) -> str:
    times = sorted(row["tpot_s"] for row in found.records if not row["warmup"])
    rate = found.facts.get("output_tok_s", 0.0)
    return f"{1e3 * times[len(times) // 2]:.3f} ms/token, {rate:,.0f} tokens/s" if times else "no requests"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.charts:
        for path in figures.write(options.charts):
            print(path)
        return
    device = options.device if options.device != "auto" else "cuda" if hardware.detect().gpus else "cpu"
    sizes = TINY if options.tiny else QUICK if options.quick else Sizes()
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)}
    changes: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None
    }
    sizes = dataclasses.replace(sizes, **changes)
    if sizes.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: the time per token is taken between tokens")
    if options.kv_dtype == "fp8" and not {*(options.suite or DEFAULT_SUITES[device])} & {*FP8_CACHE_SUITES}:
        parser.error(f"--kv-dtype fp8: an arm of the suites {', '.join(FP8_CACHE_SUITES)}")
    dtype = options.dtype or ("bf16" if device == "cuda" else "fp32")
    suites = options.suite or DEFAULT_SUITES[device]
    choice = Choice(suites, device, dtype, sizes, options.models or (), options.arms or (), options.kv_dtype)
    runs = measure(
        choice,
        out=options.out,
        budget_s=options.budget_s,
        tiny=options.tiny,
        say=lambda text: print(text, flush=True),
    )
    print(f"\n{table(runs)}\n\nRecords: {options.out}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.headline", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="default: all of the device")
    parser.add_argument("--models", nargs="+", choices=presets.DECODERS, help="default: those of each suite")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), help="default: all of each suite")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16", "int8", "int4", "fp8"], help="default: bf16; fp32 on a CPU"
    )
    words = "fp8 adds the optimized engine with an fp8 KV cache, which is lossy"
    parser.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto", help=words)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, a smaller sample for the baseline")
    parser.add_argument("--tiny", action="store_true", help="tiny models and lengths: shows that everything runs")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="no arm starts after so many seconds")
    parser.add_argument("--limit-s", type=float, help="a pass over a workload is cut after so many seconds (120)")
    parser.add_argument("--prompt-tokens", type=int, help="decode, server, cpu (128)")
    parser.add_argument("--new-tokens", type=int, help="decode, server, cpu (128)")
    parser.add_argument("--load-prompt-tokens", type=int, help="throughput (128)")
    parser.add_argument("--load-new-tokens", type=int, help="throughput (64)")
    parser.add_argument("--requests", type=int, help="throughput: at once (128)")
    parser.add_argument("--ragged", type=int, nargs=2, metavar=("LOW", "HIGH"), help="ragged: lengths (100 1024)")
    parser.add_argument("--ragged-requests", type=int, help="ragged: at once (256)")
    parser.add_argument("--baseline-requests", type=int, help="ragged: sample that the baseline runs (64; 0: all)")
    parser.add_argument("--batches", type=int, nargs="+", help="static batches that the baseline tries (32)")
    parser.add_argument("--repeats", type=int, help="most measured passes (5)")
    parser.add_argument("--warmup", type=int, help="passes before them (1)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--charts", type=Path, metavar="RUNS", help="draw the runs in this directory, measure nothing")
    parser.add_argument("--out", type=Path, default=Path("headline-runs"), help="directory of the records")
    return parser


if __name__ == "__main__":
    main()
