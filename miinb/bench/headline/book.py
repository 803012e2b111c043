"""The runs of a headline, one a suite and model, on disk as soon as an arm has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from miinb.bench.encoders.answers import Answers, compare
from miinb.bench.environment import environment
from miinb.bench.headline.trace import Measured
from miinb.bench.records import Record, Runs, new_run_id, utc_now


class Arm(Protocol):
    """A side of the comparison, as the book names it."""

    @property
    def label(self) -> str:
        """As the records name it."""

    @property
    def engine(self) -> str:
        """ "optimized" or "baseline"."""


class Workload(Protocol):
    """What a job runs."""

    @property
    def suite(self) -> str:
        """Names the run."""

    @property
    def limit_s(self) -> float:
        """Seconds that a pass may take."""

    @property
    def batches(self) -> Sequence[int]:
        """Sizes that are tried, a pass each."""

    def about(self) -> Mapping[str, Any]:
        """What the run's environment says of it."""


class Job(Protocol):
    """What the book and the worker know of a job: a model loaded as one arm, and its workloads."""

    @property
    def model(self) -> str:
        """Its name."""

    @property
    def task(self) -> str:
        """Hugging Face's name."""

    @property
    def dtype(self) -> str:
        """Of the weights."""

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""

    @property
    def arm(self) -> Arm:
        """How it is loaded."""

    @property
    def workloads(self) -> Sequence[Workload]:
        """Run one after another."""


class Book:
    """Keeps and saves what was measured.

    Args:
        facts: of every run's environment, besides the machine and the arms.
        out: directory of the runs; None: they are kept in memory alone.
    """

    def __init__(self, facts: Mapping[str, Any], out: Path | None) -> None:
        self._facts = {"host": environment(), **facts}
        self._out = out
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._env: dict[str, dict[str, Any]] = {}
        self._ids: dict[tuple[str, str, str], str] = {}
        self._truth: dict[str, Answers] = {}

    def add(self, job: Job, found: Measured, workload: Mapping[str, Any]) -> None:
        """Append an arm's requests to the run of its suite, model and task, and write it; an error is a row of its own.

        Answers are compared with those of the arm "baseline", if it came before.
        """
        arm, run_id = job.arm.label, self._run(found.suite, job)
        env, rows = self._env[run_id], self._rows[run_id]
        env["arms"][arm] = found.facts | ({"error": found.error} if found.error else {})
        env["workload"] = dict(workload)
        if arm == "baseline":
            self._truth[run_id] = found.answers
        elif found.answers:
            env["arms"][arm] |= compare(found.records, found.answers, self._truth.get(run_id, {}))
        if reason := found.error or found.facts.get("cut", ""):
            env["warnings"].append(f"{arm}: {reason.rstrip('.')}")
        new = [*found.records, *([_error_row(job, found.error)] if found.error else [])]
        rows += [row | {"run_id": run_id, "seq": len(rows) + i} for i, row in enumerate(new)]
        self._save(run_id)

    def leave_out(self, job: Job, reason: str) -> None:
        """Say in the runs that an arm was not run, and why."""
        for workload in job.workloads:
            run_id = self._run(workload.suite, job)
            self._env[run_id]["warnings"].append(f"{job.arm.label} left out: {reason}")
            if self._rows[run_id]:
                self._save(run_id)

    def runs(self, run_id: str | None = None) -> Runs:
        """All runs, or one."""
        ids = [run_id] if run_id else [key for key in self._env if self._rows[key]]
        return Runs([row for key in ids for row in self._rows[key]], {key: self._env[key] for key in ids})

    def _save(self, run_id: str) -> None:
        if self._out is not None:
            self.runs(run_id).save(self._out)

    def _run(self, suite: str, job: Job) -> str:
        key = (suite, job.model, job.task)
        if key not in self._ids:
            run_id = self._ids[key] = new_run_id()
            self._rows[run_id] = []
            words = [suite, job.model, *([job.task] if job.task != "text-generation" else [])]
            env = {"run_id": run_id, "name": " ".join(words), "suite": suite, "model": job.model, "task": job.task}
            self._env[run_id] = (
                env | {"created": utc_now()} | self._facts | {"arms": {}, "workload": {}, "warnings": []}
            )
        return self._ids[key]


def _error_row(job: Job, error: str) -> dict[str, Any]:
    record = Record("", -1, job.arm.label, model=job.model, engine=job.arm.engine, dtype=job.dtype, error=error)
    record.task, record.t_submit, record.status = job.task, utc_now(), "error"
    return {name: getattr(record, name) for name in Record.__slots__}
