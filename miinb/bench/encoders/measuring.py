"""Runs the jobs of a choice one after another and keeps a book of them."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from miinb import hardware
from miinb.bench.encoders.sessions import run_session
from miinb.bench.encoders.suites import DEFAULT_SUITES, QUICK, TINY, Choice, Job, Sizes, jobs
from miinb.bench.headline.book import Book
from miinb.bench.headline.isolation import Worker
from miinb.bench.headline.trace import Measured
from miinb.bench.records import Runs
from miinb.errors import MiinbError

Say = Callable[[str], None]


def choose(
    suites: Sequence[str] = (),
    *,
    device: str = "auto",
    dtype: str = "",
    quick: bool = False,
    tiny: bool = False,
    models: Sequence[str] = (),
    tasks: Sequence[str] = (),
    arms: Sequence[str] = (),
    **sizes: Any,
) -> Choice:
    """What is to be measured; empty takes the device's defaults. `sizes` are fields of `Sizes` (None: its default)."""
    found = ("cuda" if hardware.detect().gpus else "cpu") if device == "auto" else device
    base = TINY if tiny else QUICK if quick else Sizes()
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in sizes.items() if v is not None}
    return Choice(
        suites or DEFAULT_SUITES[found],
        found,
        dtype or ("fp16" if found == "cuda" else "fp32"),
        dataclasses.replace(base, **given) if given else base,
        models,
        tasks,
        arms,
        quick=quick or tiny,
        tiny=tiny,
    )


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
