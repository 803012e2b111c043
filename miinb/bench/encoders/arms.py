"""Runs the arms that need no server: loads a checkpoint as one of them, times it, keeps records and answers."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from miinb.bench.encoders import checkpoints
from miinb.bench.encoders.answers import Answer
from miinb.bench.encoders.engine_side import EngineSide
from miinb.bench.encoders.inputs import Encoded, Inputs
from miinb.bench.encoders.pipelines import run_pipelines
from miinb.bench.encoders.plain_side import PlainSide
from miinb.bench.encoders.side import Side
from miinb.bench.encoders.suites import AT_ONCE, Job, Workload
from miinb.bench.headline.floors import Rates
from miinb.bench.headline.trace import Measured, error_text
from miinb.bench.records import NAN, Record, utc_now
from miinb.errors import MiinbError

#: Texts of one big request whose answers are compared.
COMPARED = 64
#: Bytes of a weight, where floors are taken.
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
CLOCK_S = time.perf_counter()


def run_job(job: Job, rates: Rates) -> Iterator[Measured]:
    """Load the model and run its workloads; one that fails is reported and the others go on.

    Raises:
        MiinbError: the model could not be loaded as this arm.
    """
    folder = checkpoints.write(job)
    if job.arm.kind in ("pipeline", "batches"):
        yield from run_pipelines(job, folder)
        return
    side: Side = EngineSide(job, folder) if job.arm.kind == "engine" else PlainSide(job, folder)
    try:
        for workload in job.workloads:
            found = Measured(workload.suite)
            try:
                measure = _together if workload.suite in AT_ONCE else _one_by_one
                measure(side, job, workload, Inputs(folder, job.task), found)
                found.facts |= side.facts() | _floor(job, workload, folder, rates)
            except (RuntimeError, MiinbError, ValueError, MemoryError) as error:
                found.error = error_text(error)
            yield found
    finally:
        side.close()
        del side
        gc.collect()
        if job.device == "cuda":
            torch.cuda.empty_cache()


def _one_by_one(side: Side, job: Job, workload: Workload, maker: Inputs, found: Measured) -> None:
    """One text a request, another text each time; the inputs are made before the clock starts."""
    count = workload.warmup + workload.repeats
    prepared = [side.prepare(maker.sequences(workload.lengths, f"{workload.seed}/{n}"), 1) for n in range(count)]
    for number, ready in enumerate(prepared, -workload.warmup):
        began = time.perf_counter()
        run = side.run(ready)
        end_s = time.perf_counter() - began
        row = record(job, number, 1, workload.lengths[0], began, end_s)
        row["model_s"], row["queue_s"] = run.model_s, run.queue_s
        found.records.append(row)
        found.answers[row["prompt_id"]] = side.answers(ready, run, 1)


def _together(side: Side, job: Job, workload: Workload, maker: Inputs, found: Measured) -> None:
    """All texts at once, in the baseline's batches of the size that is fastest (in one request, where there are none).

    Raises:
        MiinbError: no size of batch fits the memory.
    """
    sequences = maker.sequences(workload.lengths, workload.seed)
    tokens = sum(len(one.token_ids) for one in sequences)
    tried: dict[int, float] = {}
    best: list[dict[str, Any]] = []
    sizes = workload.batches if side.batched else (0,)
    for size in _sizes(side, sizes, len(sequences)):
        try:
            rows = _passes(side, job, workload, sequences, size, tokens, found)
        except (torch.OutOfMemoryError, MemoryError):
            continue
        finally:
            gc.collect()
        tried[size] = len(sequences) / statistics.median(row["e2e_s"] for row in rows if not row["warmup"])
        if tried[size] == max(tried.values()):
            best = rows
    if not best:
        raise MiinbError("No size of batch fits the memory.")
    found.records = best
    if any(tried):
        found.facts["static_batch"] = max(tried, key=lambda size: tried[size])
        found.facts["tried_seq_s"] = {f"batch {size}": rate for size, rate in tried.items()}


def _sizes(side: Side, sizes: Sequence[int], count: int) -> list[int]:
    """Sizes to try; of a compiled model the largest that is worth it alone, as each is a compilation of its own."""
    fit = [size for size in sizes if size <= count] or [count]
    return fit[-1:] if side.compiled else fit


def _passes(
    side: Side,
    job: Job,
    workload: Workload,
    sequences: Sequence[Encoded],
    size: int,
    tokens: int,
    found: Measured,
) -> list[dict[str, Any]]:
    ready = side.prepare(sequences, size)
    rows = []
    for number in range(-workload.warmup, workload.repeats):
        began = time.perf_counter()
        run = side.run(ready)
        end_s = time.perf_counter() - began
        rows.append(record(job, number, len(sequences), tokens, began, end_s))
        rows[-1]["model_s"], rows[-1]["queue_s"] = run.model_s, run.queue_s
        if number == 0:
            sample: list[Answer] = side.answers(ready, run, COMPARED)
            found.answers = {rows[-1]["prompt_id"]: sample}
        del run
    return rows


def record(job: Job, number: int, texts: int, tokens: int, began: float, end_s: float) -> dict[str, Any]:
    """A request's row; a negative number is a warm-up."""
    made = Record("", -1, job.arm.label, model=job.model, engine=job.arm.engine, dtype=job.dtype)
    made.task, made.t_submit, made.concurrency = job.task, utc_now(), 1
    made.batch_size, made.prompt_tokens = texts, tokens
    made.block, made.warmup, made.prompt_id = number, number < 0, str(number)
    made.t_rel_s, made.e2e_s, made.finish_reason = began - CLOCK_S, end_s, "stop"
    return {name: getattr(made, name) for name in Record.__slots__}


def _floor(job: Job, workload: Workload, folder: Path, rates: Rates) -> dict[str, Any]:
    """`floor_s`: least seconds of the request: its weights read once, or its products, whichever takes longer."""
    weights, per_pair = checkpoints.matrix_weights(folder, job.task), checkpoints.attention_work(folder)
    operations = sum(2 * weights * length + per_pair * length * length for length in workload.lengths)
    read_s = weights * WIDTH[job.dtype] / rates.copy_bytes_s
    return {
        "floor_s": max(read_s, operations / rates.matmul_flop_s) if operations else math.inf,
        "device": job.device,
        "n_gpus": int(job.device == "cuda"),
        "weights_bytes": weights * WIDTH[job.dtype],
        "peak_mem_bytes": float(torch.cuda.max_memory_allocated()) if job.device == "cuda" else NAN,
    }
