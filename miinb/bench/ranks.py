"""What tensor parallelism gives on a CPU: several ranks of one thread each against one rank of one thread.

`python -m miinb.bench.ranks` writes a checkpoint of random weights of a public configuration (so that both arms have
the same, and their answers are compared), starts both deployments, and asks them in turns for the same tokens, one
request at a time. On a machine without other work it says what a second core gives; both are started with the same
threads and cores, so that nothing but the number of ranks differs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miinb.bench import presets
from miinb.bench.records import Runs
from miinb.bench.runner import compare
from miinb.bench.startup import write_checkpoint
from miinb.session import Session


def measure(folder: Path, *, ranks: int, all_reduce: str, **workload: Any) -> Runs:
    """Both arms in turns, in fp32; their processes are gone when it returns.

    Args:
        folder: of the model.
        ranks: of the second arm.
        all_reduce: `EngineOptions.all_reduce` of the second arm.
        workload: fields of `BenchConfig`.
    """
    fields: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "max_batch": 1}
    fields["max_length"] = workload["prompt_tokens"] + workload["new_tokens"] + 8
    several = {"threads": 1, "all_reduce": all_reduce}
    with (
        Session(folder, "text-generation", **fields, options={"threads": 1}) as one,
        Session(folder, "text-generation", **fields, tensor_parallel=ranks, options=several) as many,
    ):
        runs = compare({"1 rank": one, f"{ranks} ranks": many}, check="exact", **workload)
        (line,) = [line for line in many.plan().lines if line.what == "all-reduce"]
    for env in runs.env.values():
        env["all_reduce"] = line.choice
    return runs


def ratio(runs: Runs) -> float:
    """By how much several ranks are faster than one: of the medians of the time per output token."""
    one, many = (float(value) for value in runs.summary["tpot_p50_s"])
    return one / many


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and store the run if asked."""
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.ranks", description=__doc__)
    parser.add_argument("--model", choices=presets.DECODERS, default="gpt2", help="shape of the model (gpt2)")
    parser.add_argument("--ranks", type=int, default=2, help="of the second arm (2)")
    parser.add_argument("--all-reduce", choices=["auto", "shared_memory", "gloo"], default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=10, help="of each arm")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that everything runs")
    parser.add_argument("--out", type=Path, help="folder to append the run to (miinb.load_runs reads it)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="miinb-ranks-") as place:
        folder = presets.write_into(place, options.model, small=options.tiny)
        write_checkpoint(folder)
        runs = measure(
            folder,
            ranks=options.ranks,
            all_reduce=options.all_reduce,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            requests=options.requests,
            warmup=1,
        )
    print(runs)
    how = next(iter(runs.env.values()))["all_reduce"]
    print(f"{options.ranks} ranks of one thread ({how}) are {ratio(runs):.2f} times as fast as one.")
    if options.out is not None:
        runs.save(options.out)


if __name__ == "__main__":
    main()
