"""The engine behind its server: the same lengths through a `Session`, as a notebook would ask."""

from __future__ import annotations

from collections.abc import Iterator

from miinb.bench.headline.suites import Job
from miinb.bench.headline.trace import Measured
from miinb.bench.records import rows_of
from miinb.session import Session


def served(job: Job) -> Iterator[Measured]:
    """What each workload of a job measured through the client, one request at a time.

    Raises:
        MiinbError: the server could not be started, or a request failed.
    """
    length = max(workload.longest for workload in job.workloads) + 8
    with Session(
        job.folder, "text-generation", load_format="dummy", dtype=job.dtype, device=job.device, max_length=length
    ) as session:
        for workload in job.workloads:
            prompt, new = workload.lengths[0]
            runs = session.bench(
                prompt_tokens=prompt,
                new_tokens=new,
                requests=workload.repeats,
                warmup=workload.warmup,
                seed=workload.seed,
                timeout_s=workload.limit_s,
            )
            rows = rows_of(runs)
            facts = next(iter(runs.env.values()))["arms"]["optimized"]
            same = {"arm": job.arm.label, "model": job.model, "batch_size": 1, "point": 0}
            yield Measured(workload.suite, [row | same for row in rows], facts)
