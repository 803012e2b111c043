"""The runs of a headline, one a suite and model, on disk as soon as an arm has ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miinb.bench.environment import environment
from miinb.bench.headline.suites import Job
from miinb.bench.headline.trace import Measured
from miinb.bench.records import Record, Runs, new_run_id, utc_now


class Book:
    """Keeps and saves what was measured.

    Args:
        facts: of every run's environment, besides the machine and the arms.
        out: directory of the runs.
    """

    def __init__(self, facts: Mapping[str, Any], out: Path) -> None:
        self._facts = {"host": environment(), **facts}
        self._out = out
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._env: dict[str, dict[str, Any]] = {}
        self._ids: dict[tuple[str, str], str] = {}

    def add(self, job: Job, found: Measured, workload: Mapping[str, Any]) -> None:
        """Append an arm's requests to the run of its suite and model, and write it. An error is a row of its own."""
        arm, run_id = job.arm.label, self._run(found.suite, job.model)
        env, rows = self._env[run_id], self._rows[run_id]
        env["arms"][arm] = found.facts | ({"error": found.error} if found.error else {})
        env["workload"] = dict(workload)
        if reason := found.error or found.facts.get("cut", ""):
            env["warnings"].append(f"{arm}: {reason.rstrip('.')}")
        new = [*found.records, *([_error_row(job, found.error)] if found.error else [])]
        rows += [row | {"run_id": run_id, "seq": len(rows) + i} for i, row in enumerate(new)]
        self.runs(run_id).save(self._out)

    def leave_out(self, job: Job, reason: str) -> None:
        """Say in the runs that an arm was not run, and why."""
        for workload in job.workloads:
            run_id = self._run(workload.suite, job.model)
            self._env[run_id]["warnings"].append(f"{job.arm.label} left out: {reason}")
            if self._rows[run_id]:
                self.runs(run_id).save(self._out)

    def runs(self, run_id: str | None = None) -> Runs:
        """All runs, or one."""
        ids = [run_id] if run_id else [key for key in self._env if self._rows[key]]
        return Runs([row for key in ids for row in self._rows[key]], {key: self._env[key] for key in ids})

    def _run(self, suite: str, model: str) -> str:
        if (suite, model) not in self._ids:
            run_id = self._ids[suite, model] = new_run_id()
            self._rows[run_id] = []
            env = {"run_id": run_id, "name": f"{suite} {model}", "suite": suite, "model": model, "created": utc_now()}
            self._env[run_id] = env | self._facts | {"arms": {}, "workload": {}, "warnings": []}
        return self._ids[suite, model]


def _error_row(job: Job, error: str) -> dict[str, Any]:
    record = Record("", -1, job.arm.label, model=job.model, engine=job.arm.engine, dtype=job.dtype, error=error)
    record.task, record.t_submit, record.status = "text-generation", utc_now(), "error"
    return {name: getattr(record, name) for name in Record.__slots__}
