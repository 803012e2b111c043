"""Runs the arms: loads a model as one of them, drives it through workloads, and makes records of every request."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from miinb import hardware, models, planner
from miinb.bench.headline import floors
from miinb.bench.headline.suites import Job, Workload
from miinb.bench.headline.trace import Measured, Trace, error_text
from miinb.bench.records import NAN, Record
from miinb.config import DeploymentConfig, GenerationParams
from miinb.engine.executor import Executor
from miinb.engine.loading import load_executor
from miinb.errors import MiinbError
from miinb.messages import FailedEvent, FinishedEvent, Phase, SequenceRequest, TokensEvent

#: Passes end once they have taken so long: a median of few long ones is as good as one of many short ones.
ENOUGH_S = 4.0
#: New tokens of a warm-up pass of many requests, but for compiled arms, which compile for the lengths themselves.
WARM_TOKENS = 4


def run_job(job: Job, rates: floors.Rates) -> Iterator[Measured]:
    """Load the model and run its workloads; one that fails is reported and the others go on.

    Raises:
        MiinbError: the model could not be loaded as this arm.
    """
    folder = Path(job.folder)
    if job.checkpoint:
        folder = write_checkpoint(folder, job.dtype, job.device)
    memory = Memory(job.device)
    executor = _load(job, folder, memory)
    model = models.inspect(folder, load_format="auto" if job.checkpoint else "dummy")
    try:
        for workload in job.workloads:
            found = Measured(workload.suite)
            try:
                found.records, facts = measure(executor, job, workload)
                found.facts = facts | facts_of(executor, job, memory) | floor_of(executor, job, workload, model, rates)
            except (RuntimeError, MiinbError, ValueError, MemoryError) as error:
                found.error = error_text(error)
            yield found
    finally:
        executor.close()
        del executor
        gc.collect()
        if job.device == "cuda":
            torch.cuda.empty_cache()


class Memory:
    """The GPU's peaks (`torch.cuda.max_memory_allocated`, bytes) at each phase of a start."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.at: dict[str, float] = {}
        self.before = 0.0
        self.planned = NAN  # of the KV cache, by the planner
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = float(torch.cuda.memory_allocated())

    def note(self, phase: Phase) -> None:
        """Called when a phase begins: what came before has had this peak."""
        self.at.setdefault(phase.name, self.peak())

    def peak(self) -> float:
        """Most bytes at once so far."""
        return float(torch.cuda.max_memory_allocated()) - self.before if self.gpu else NAN

    @property
    def load_peak(self) -> float:
        """The peak of loading the weights: before the check of the layers, the cache and the graphs."""
        return self.at.get("verify", self.at.get("capture", NAN))


def _load(job: Job, folder: Path, memory: Memory) -> Executor:
    """The job's model as its arm. Raises MiinbError, also if something else than the arm would run."""
    model = models.inspect(folder, load_format="auto" if job.checkpoint else "dummy")
    length = max(workload.longest for workload in job.workloads) + 8
    rows = max(8, *(len(workload.lengths) for workload in job.workloads))
    options: dict[str, Any] = {"max_queue": 4096}
    if job.arm.compiled:
        options["compile"] = True
    config = DeploymentConfig.parse(
        {
            "model": str(folder),
            "task": "text-generation",
            "engine": job.arm.engine,
            "load_format": "auto" if job.checkpoint else "dummy",
            "dtype": job.dtype,
            "kv_dtype": job.arm.kv_dtype,
            "device": job.device,
            "options": options,
        }
        | ({} if job.checkpoint else {"max_batch": rows, "max_length": min(length, model.context_length or length)})
    )
    if job.checkpoint:  # as a server would: the planner chooses
        machine = hardware.detect()
        choice = planner.plan(config, model, machine)
        memory.planned = float(choice.kv_cache_bytes)
        config = planner.resolve(config, choice, machine)
    gpus = [0] if job.device == "cuda" else None
    executor = load_executor(config, replica=0, rank=0, gpus=gpus, folder=folder, report=memory.note)
    if executor.info.engine != job.arm.engine:
        executor.close()
        raise MiinbError("; ".join(executor.info.plan.warnings))
    return executor


def write_checkpoint(folder: Path, dtype: str, device: str) -> Path:
    """Random weights as transformers saves them, in a folder beside the configuration's."""
    import transformers

    target = folder.with_name(f"{folder.name}-checkpoint")
    if not (target / "config.json").exists():
        with torch.device(device):
            settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            kind = floors.DTYPES.get(dtype, torch.bfloat16)
            transformers.AutoModelForCausalLM.from_config(settings, dtype=kind).save_pretrained(target)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (target / name).write_bytes((folder / name).read_bytes())
        gc.collect()
    return target


def measure(executor: Executor, job: Job, workload: Workload) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of one workload (of the faster batch size, where several are tried), and what else is to be kept.

    Raises:
        MiinbError: the engine failed on a request.
    """
    lengths = workload.lengths
    sizes: tuple[int, ...] = (0,)
    if job.arm.engine == "baseline" and workload.at_once:
        lengths = workload.sorted_sample()
        sizes = (0,) if job.arm.continuous else workload.batches
        sizes = sizes[:1] if job.arm.compiled else sizes  # each size is a compilation of its own
    tried: dict[str, float] = {}
    best: tuple[float, list[list[Trace]]] = (-1.0, [])
    for size in sizes:
        if size:
            executor.info = dataclasses.replace(executor.info, max_batch=size)
        try:
            passes = list(_passes(executor, job, workload, lengths))
        except MiinbError:
            if size == sizes[-1] and not tried:
                raise
            continue  # too large a batch for the memory; the next one is smaller
        rate = statistics.median(token_rate(traces) for traces in passes[_warm(job, workload) :])
        tried[f"batch {size}" if size else "all at once"] = rate
        best = max(best, (rate, passes), key=lambda pair: pair[0])
    rows = [
        _record(job, workload, trace, number, len(lengths), executor)
        for number, traces in enumerate(best[1], -_warm(job, workload))
        for trace in traces
        if number >= 0 or not workload.at_once
    ]
    facts: dict[str, Any] = {"output_tok_s": best[0], "requests": len(lengths)}
    if sizes != (0,):
        facts["static_batch"] = max(tried, key=lambda name: tried[name]).removeprefix("batch ")
    if len(sizes) > 1:
        facts["tried_tok_s"] = tried
    cut = [trace for traces in best[1] for trace in traces if trace.cut]
    if cut:
        facts["cut"] = f"stopped after {workload.limit_s:.0f} s with {len(cut)} of {len(lengths)} requests unfinished"
    return rows, facts


def _warm(job: Job, workload: Workload) -> int:
    """Warm-up passes; continuous batching warms itself up."""
    return 0 if job.arm.continuous else min(workload.warmup, 1) if workload.at_once else workload.warmup


def _passes(
    executor: Executor, job: Job, workload: Workload, lengths: Sequence[tuple[int, int]]
) -> Iterator[list[Trace]]:
    """Warm-up passes, then measured ones until there are enough (two of one request, one of many)."""
    least, spent = (1 if workload.at_once else 2), 0.0
    for number in range(_warm(job, workload) + workload.repeats):
        warm = number < _warm(job, workload)
        short = warm and workload.at_once and not job.arm.compiled
        asked = [(prompt, min(new, WARM_TOKENS) if short else new) for prompt, new in lengths]
        prompts = workload.prompts(asked, executor.info.vocab_size, number)
        requests = [
            SequenceRequest(next(_row_ids), prompt, GenerationParams(max_new_tokens=new, ignore_eos=True, seed=0), 0.0)
            for prompt, (_, new) in zip(prompts, asked, strict=True)
        ]
        traces = _driver(job)(executor, requests, workload.limit_s)
        yield traces
        spent += 0.0 if warm else max(trace.end_s for trace in traces)
        if not warm and number + 1 - _warm(job, workload) >= least and spent > ENOUGH_S:
            return


_row_ids = itertools.count()


def _driver(job: Job) -> Callable[[Any, Sequence[SequenceRequest], float], list[Trace]]:
    if job.arm.continuous:
        from miinb.bench.headline import continuous  # it imports transformers, which the other arms may not need

        return continuous.drive
    return drive_executor


def drive_executor(executor: Executor, requests: Sequence[SequenceRequest], limit_s: float) -> list[Trace]:
    """Submit all requests, step until they have ended (or the time has), and note when each token came.

    Raises:
        MiinbError: the engine failed on a request.
    """
    traces: dict[int, Trace] = {}
    started = time.perf_counter()

    def take(event: object) -> None:
        now = time.perf_counter() - started
        if isinstance(event, TokensEvent):
            traces[event.row_id].times.extend([now] * len(event.token_ids))
        elif isinstance(event, FailedEvent):
            traces[event.row_id].error = f"{event.error}: {event.message}"
            traces[event.row_id].end(now)
        elif isinstance(event, FinishedEvent):
            traces[event.row_id].end(now, cut=event.finish_reason == "cancelled")

    def poll() -> None:
        if time.perf_counter() - started > limit_s:
            for row_id, trace in traces.items():
                if not trace.ended:
                    executor.cancel(row_id, "cancelled")

    for request in requests:
        traces[request.row_id] = Trace.of(request, started)
        executor.submit(dataclasses.replace(request, t_submit=time.monotonic()))
    while executor.busy:
        executor.step(take, poll)
        poll()
    failed = [trace.error for trace in traces.values() if trace.error]
    if failed:
        raise MiinbError(f"{len(failed)} of {len(traces)} requests failed. {failed[0]}")
    return list(traces.values())


def token_rate(traces: Sequence[Trace]) -> float:
    """Output tokens a second of a pass, from the first submit to the last token."""
    end = max((trace.end_s for trace in traces), default=0.0)
    return sum(len(trace.times) for trace in traces) / end if end > 0 else 0.0


def _record(
    job: Job, workload: Workload, trace: Trace, number: int, requests: int, executor: Executor
) -> dict[str, Any]:
    """A request's row, by the definitions of `records.DEFINITIONS`. Raises MiinbError if work is missing."""
    if not trace.cut and len(trace.times) != trace.wanted and number >= 0:
        raise MiinbError(f"{len(trace.times)} tokens came, {trace.wanted} were asked for.")
    info = executor.info
    record = Record("", -1, job.arm.label, model=job.model, engine=info.engine, dtype=info.dtype)
    record.task, record.seed, record.t_submit = "text-generation", 0, trace.submitted
    record.concurrency = requests if workload.at_once else 1
    record.batch_size = NAN if workload.at_once else 1
    record.block, record.warmup = number, number < 0
    record.prompt_id, record.prompt_tokens = str(number), trace.prompt_tokens
    record.t_rel_s = trace.began_s
    record.output_tokens = record.chunk_count = len(trace.times)
    record.e2e_s = record.model_s = trace.end_s
    record.finish_reason = "length"
    if trace.cut:
        record.status, record.finish_reason, record.error = "cancelled", "cancelled", "the pass was cut"
    if trace.times:
        record.ttft_s = trace.times[0]
    gaps = [after - before for before, after in pairwise(trace.times)]
    if gaps:
        record.tpot_s = (trace.times[-1] - trace.times[0]) / len(gaps)
        record.itl_p50_s, record.itl_max_s = statistics.median(gaps), max(gaps)
    return {name: getattr(record, name) for name in Record.__slots__}


def facts_of(executor: Executor, job: Job, memory: Memory) -> dict[str, Any]:
    """What is kept of an arm besides its requests."""
    plan = executor.info.plan
    return {
        "n_gpus": int(job.device == "cuda"),
        "device": job.device,
        "load_s": executor.info.load_s,
        "weights_bytes": plan.weights_bytes or NAN,
        "kv_cache_bytes": float(executor.status().get("kv_cache_bytes", 0)) or NAN,
        "kv_planned_bytes": memory.planned,
        "load_peak_bytes": memory.load_peak,
        "peak_mem_bytes": memory.peak(),
        "plan": str(plan).splitlines(),
        "status": executor.status(),
    }


def floor_of(
    executor: Executor, job: Job, workload: Workload, model: models.ModelInfo, rates: floors.Rates
) -> dict[str, Any]:
    """`floor_s`, least seconds a token of one request at a time, or `floor_tok_s`, most tokens a second at once."""
    weights = executor.info.plan.weights_bytes or model.weights_bytes(executor.info.dtype)
    if not workload.at_once:
        return {"floor_s": floors.one_row_s(model, weights, rates)}
    on_gpu = job.device == "cuda"
    token = model.kv_bytes_per_token(executor.info.dtype, kv_dtype=job.arm.kv_dtype, on_gpu=on_gpu)
    whole = floors.all_rows_s(model, weights, token, workload.lengths, rates)
    tokens = sum(new for _, new in workload.lengths)
    return {"floor_tok_s": tokens / whole if whole > 0 else math.inf}
