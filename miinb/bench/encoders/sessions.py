"""The optimized engine behind its server, asked as a notebook would: one client, one big list, many clients at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from miinb.bench.encoders import clients
from miinb.bench.encoders.clients import Call, records_of
from miinb.bench.encoders.inputs import Inputs
from miinb.bench.encoders.predictions import answer_of
from miinb.bench.encoders.suites import Job, Workload
from miinb.bench.headline.trace import Measured, error_text
from miinb.errors import MiinbError
from miinb.hardware import detect
from miinb.session import Session

#: Options of a request, where the baseline answers something else than the default.
OPTIONS: dict[str, dict[str, Any]] = {
    "text-classification": {"top_k": 3},
    "feature-extraction": {"pooling": "mean"},
}


def run_session(job: Job) -> Iterator[Measured]:
    """What each workload of a job measured through the client.

    Raises:
        MiinbError: the server could not be started, or runs something else than the fused engine.
    """
    with Session(job.folder, job.task, dtype=job.dtype, device=job.device) as session:
        plan = session.plan()
        if plan.engine != "optimized":
            raise MiinbError("; ".join(plan.warnings) or "The fused engine does not run this model.")
        facts = {"n_gpus": int(job.device == "cuda"), "load_s": session.load_s, "plan": str(plan).splitlines()}
        maker = Inputs(Path(job.folder), job.task)
        for workload in job.workloads:
            found = Measured(workload.suite)
            try:
                _RUNS[workload.suite](session, job, workload, maker, found)
                found.facts |= facts
            except (MiinbError, ValueError) as error:
                found.error = error_text(error)
            yield found


def _served(session: Session, job: Job, workload: Workload, maker: Inputs, found: Measured) -> None:
    """One text after another, another each time."""
    options = OPTIONS.get(job.task, {})
    for number, text in maker.one_each(workload):
        (predictions,), call = _timed(session, text, options)
        found.records += records_of(job, workload, [call], number)
        found.answers[str(number)] = [answer_of(job.task, predictions)]


def _embeddings(session: Session, job: Job, workload: Workload, maker: Inputs, found: Measured) -> None:
    """All texts in one call."""
    texts = maker.texts(workload.lengths, workload.seed)
    predictions: Any = []
    for number in range(-workload.warmup, workload.repeats):
        predictions, call = _timed(session, texts, OPTIONS[job.task])
        found.records += records_of(job, workload, [call], number)
    found.answers["0"] = [answer_of(job.task, one) for one in predictions]


def _clients(session: Session, job: Job, workload: Workload, maker: Inputs, found: Measured) -> None:
    texts, options = tuple(maker.texts(workload.lengths, workload.seed)), OPTIONS.get(job.task, {})
    for text in texts[: workload.warmup]:
        session.predict(text, **options)
    cores = detect().cores
    processes = clients.processes_for(workload.clients, cores)
    load = clients.Load(session.address, job.task, texts, options, workload.clients, workload.seconds)
    calls, found.answers = clients.drive(load, processes)
    found.records = records_of(job, workload, calls, 0)
    found.facts = {"client_processes": processes, "cores": cores}


_RUNS: dict[str, Callable[[Session, Job, Workload, Inputs, Measured], None]] = {
    "served": _served,
    "embeddings": _embeddings,
    "clients": _clients,
}


def _timed(session: Session, inputs: Any, options: dict[str, Any]) -> tuple[Any, Call]:
    """The predictions, and where the call's time went: the parts by the server's clock, the whole by this one."""
    t_start = time.perf_counter()
    predictions = session.predict(inputs, **options)
    call = Call(t_start, time.perf_counter() - t_start)
    call.fill(predictions.timing)
    return predictions, call
