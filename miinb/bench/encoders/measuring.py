"""Runs the jobs of a choice one after another and keeps a book of them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from miinb import hardware
from miinb.bench.encoders.sessions import run_session
from miinb.bench.encoders.suites import DEFAULT_SUITES, QUICK, TINY, Choice, Job, Sizes, jobs
from miinb.bench.headline.isolation import Worker
from miinb.bench.headline.running import Say, run_jobs
from miinb.bench.headline.trace import Measured
from miinb.bench.records import Runs


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
    worker = Worker("miinb.bench.encoders.arms")
    with tempfile.TemporaryDirectory(prefix="miinb-encoders-") as place:
        return run_jobs(
            *(jobs(choice, place), worker, lambda job, rates: _measured(job, worker, rates)),
            dtype=choice.dtype,
            small=choice.tiny,
            out=out,
            budget_s=budget_s,
            name=lambda job: f"{job.model} {job.task}",
            words=_words,
            say=say,
        )


def _measured(job: Job, worker: Worker, rates: Any) -> Iterator[Measured]:
    if job.arm.kind != "session":
        yield from worker.run(job, rates)
        return
    if not Path(job.folder).is_dir():  # no baseline ran before: its process makes the checkpoint
        list(worker.run(dataclasses.replace(job, workloads=()), rates))
    worker.close()  # the server needs its memory
    yield from run_session(job)


def _words(found: Measured) -> str:
    rows = [row for row in found.records if not row["warmup"]]
    times = sorted(row["e2e_s"] for row in rows)
    if not times:
        return "no requests"
    return f"{len(times)} requests, median {1e3 * times[len(times) // 2]:.3f} ms"
