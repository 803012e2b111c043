"""`python -m miinb.bench.encoders`: run suites of encoders, print the table, write the runs, draw them."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from miinb import hardware
from miinb.bench import presets
from miinb.bench.encoders import figures
from miinb.bench.encoders.sessions import run_session
from miinb.bench.encoders.suites import (
    DEFAULT_SUITES,
    HEADS,
    LABELS,
    QUICK,
    SUITES,
    TINY,
    Choice,
    Job,
    Sizes,
    jobs,
)
from miinb.bench.encoders.table import table
from miinb.bench.headline.book import Book
from miinb.bench.headline.isolation import Worker
from miinb.bench.headline.trace import Measured
from miinb.bench.records import Runs
from miinb.errors import MiinbError

Say = Callable[[str], None]


def measure(choice: Choice, *, out: Path, budget_s: float = float("inf"), say: Say = print) -> Runs:
    """Run every job of a choice, one after another; arms that fail or find no time are said in their runs.

    Args:
        choice: suites, models, tasks, arms, sizes.
        out: directory that gets a folder a run, written as soon as an arm has ended.
        budget_s: no job starts after so many seconds.
        say: told what is going on.
    """
    started = time.monotonic()
    worker = Worker("miinb.bench.encoders.arms")
    with tempfile.TemporaryDirectory(prefix="miinb-encoders-") as place:
        todo = jobs(choice, place)
        try:
            rates = {
                device: worker.rates(device, choice.dtype, small=choice.tiny)
                for device in dict.fromkeys(job.device for job in todo)
            }
            book = Book({"rates": {device: dataclasses.asdict(found) for device, found in rates.items()}}, out)
            for number, job in enumerate(todo, 1):
                spent = time.monotonic() - started
                say(f"[{spent:4.0f} s, {number}/{len(todo)}] {job.model} {job.task}: {job.arm.label} ({job.dtype})")
                if spent > budget_s:
                    book.leave_out(job, f"the budget of {budget_s:.0f} s was spent")
                    continue
                _run(job, worker, rates[job.device], book, say)
        finally:
            worker.close()
    return book.runs()


def _run(job: Job, worker: Worker, rates: Any, book: Book, say: Say) -> None:
    """One job into the book; what fails is recorded."""
    left = {workload.suite: workload for workload in job.workloads}
    try:
        for found in _measured(job, worker, rates):
            book.add(job, found, left.pop(found.suite).about())
            say(f"    {found.suite}: {found.error or _words(found)}")
    except MiinbError as failure:
        for suite, workload in left.items():
            book.add(job, Measured(suite, error=failure.message), workload.about())
        say(f"    failed: {failure.message}")


def _measured(job: Job, worker: Worker, rates: Any) -> Iterator[Measured]:
    if job.arm.kind != "session":
        return worker.run(job, rates)
    if not Path(job.folder).is_dir():  # no baseline ran before: its process makes the checkpoint
        list(worker.run(dataclasses.replace(job, workloads=()), rates))
    worker.close()  # the server needs its memory
    return run_session(job)


def _words(found: Measured) -> str:
    rows = [row for row in found.records if not row["warmup"]]
    times = sorted(row["e2e_s"] for row in rows)
    if not times:
        return "no requests"
    return f"{len(times)} requests, median {1e3 * times[len(times) // 2]:.3f} ms"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = _parser().parse_args(arguments)
    if options.charts:
        for path in figures.write(options.charts, published=options.published):
            print(path)
        return
    device = options.device if options.device != "auto" else "cuda" if hardware.detect().gpus else "cpu"
    sizes = TINY if options.tiny else QUICK if options.quick else Sizes()
    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Sizes)}
    changes: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None
    }
    if changes:
        sizes = dataclasses.replace(sizes, **changes)
    dtype = options.dtype or ("fp16" if device == "cuda" else "fp32")
    suites = options.suite or DEFAULT_SUITES[device]
    quick = options.quick or options.tiny
    named = (options.models or (), options.tasks or (), options.arms or ())
    choice = Choice(suites, device, dtype, sizes, *named, quick=quick, tiny=options.tiny)
    runs = measure(choice, out=options.out, budget_s=options.budget_s, say=lambda text: print(text, flush=True))
    print(f"\n{table(runs)}\n\nRecords: {options.out}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.encoders", description=__doc__)
    encoders = sorted(name for name, values in presets.PRESETS.items() if values["model_type"] in ENCODERS)
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="default: those of the device")
    parser.add_argument("--models", nargs="+", choices=encoders, help="default: those of each suite")
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
    parser.add_argument("--repeats", type=int, help="measured requests, one at a time (50; at most 15 on a CPU)")
    parser.add_argument("--passes", type=int, help="measured passes over texts that come together (5)")
    parser.add_argument("--warmup", type=int, help="requests before them (5)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--charts", type=Path, metavar="RUNS", help="draw the runs in this directory, measure nothing")
    parser.add_argument("--published", action="store_true", help="charts: MII's figures of 2022 beside the measured")
    parser.add_argument("--out", type=Path, default=Path("encoder-runs"), help="directory of the records")
    return parser


#: Families whose presets these suites run.
ENCODERS = ("bert", "roberta", "distilbert")


if __name__ == "__main__":
    main()
