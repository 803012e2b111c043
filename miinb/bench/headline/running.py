"""Runs jobs one after another into a book, within a budget of time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from miinb.bench.headline.book import Book, Job
from miinb.bench.headline.isolation import Worker
from miinb.bench.headline.trace import Measured
from miinb.bench.records import Runs
from miinb.errors import MiinbError

Say = Callable[[str], None]
AnyJob = TypeVar("AnyJob", bound=Job)
#: What each workload of a job measured, given the machine's rates.
Measure = Callable[[AnyJob, Any], Iterator[Measured]]


def run_jobs(
    todo: Sequence[AnyJob],
    worker: Worker,
    measure: Measure[AnyJob],
    *,
    dtype: str,
    small: bool,
    out: Path,
    budget_s: float,
    name: Callable[[AnyJob], str],
    words: Callable[[Measured], str],
    say: Say,
) -> Runs:
    """Run jobs, one after another; those that fail or find no time are said in their runs.

    Args:
        todo: the jobs.
        worker: measures the machine's rates; closed at the end.
        measure: runs a job.
        dtype: of the rates.
        small: rates by small sizes, for tiny models.
        out: directory that gets a folder a run, written as soon as an arm has ended.
        budget_s: no job starts after so many seconds.
        name: a job in a few words.
        words: what a workload measured, in a few words.
        say: told what is going on.
    """
    started = time.monotonic()
    try:
        rates = {
            device: worker.rates(device, dtype, small=small) for device in dict.fromkeys(job.device for job in todo)
        }
        book = Book({"rates": {device: dataclasses.asdict(found) for device, found in rates.items()}}, out)
        for number, job in enumerate(todo, 1):
            spent = time.monotonic() - started
            say(f"[{spent:4.0f} s, {number}/{len(todo)}] {name(job)}: {job.arm.label} ({job.dtype})")
            if spent > budget_s:
                book.leave_out(job, f"the budget of {budget_s:.0f} s was spent")
                continue
            _run(job, measure(job, rates[job.device]), book, words, say)
    finally:
        worker.close()
    return book.runs()


def _run(job: Job, measured: Iterator[Measured], book: Book, words: Callable[[Measured], str], say: Say) -> None:
    """One job into the book; what fails is recorded."""
    left = {workload.suite: workload for workload in job.workloads}
    try:
        for found in measured:
            book.add(job, found, left.pop(found.suite).about())
            say(f"    {found.suite}: {found.error or words(found)}")
    except MiinbError as failure:
        for suite, workload in left.items():
            book.add(job, Measured(suite, error=failure.message), workload.about())
        say(f"    failed: {failure.message}")
