"""Runs an arm: loads the model as a deployment would, times single requests, and lets it predict the text."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from miinb.bench.headline import arms, suites
from miinb.bench.headline.trace import Measured, error_text
from miinb.bench.quality.jobs import Job, Reading
from miinb.engine.executor import Executor, StepExecutor
from miinb.engine.kv_cache import cache_dtype
from miinb.engine.loading import load_executor
from miinb.engine.perplexity import token_losses
from miinb.errors import MiinbError, NonFinite

#: Mean negative log-likelihood from which on its exponential is no float.
LARGEST = 700.0


def run_job(job: Job, _rates: object) -> Iterator[Measured]:
    """Load the model, time the requests, read the text; what fails is reported.

    Raises:
        MiinbError: the model could not be loaded as this arm.
    """
    memory = arms.Memory(job.device)
    gpus = [number for part in job.config.gpus or () for number in (part if isinstance(part, list) else [part])]
    with tempfile.TemporaryDirectory(prefix="miinb-quality-") as folder:
        place = Path(folder)
        executor = load_executor(job.config, replica=0, rank=0, gpus=gpus or None, folder=place, report=memory.note)
    (reading,) = job.workloads
    found = Measured(reading.suite)
    try:
        timed = suites.Job(job.model, job.config.model, job.arm, job.device, job.dtype, (reading.decode,))
        found.records, facts = arms.measure(executor, timed, reading.decode)
        facts |= arms.facts_of(executor, timed, memory)  # before the text's logits count as its memory
        found.facts = facts | read(executor, job, reading)
    except (RuntimeError, MiinbError, ValueError, MemoryError) as error:
        found.error = error_text(error)
    finally:
        executor.close()
        del executor
        gc.collect()
        if job.device == "cuda":
            torch.cuda.empty_cache()
    yield found


def read(executor: Executor, job: Job, reading: Reading) -> dict[str, Any]:
    """What the model says of the text: `perplexity`; `losses` and `likeliest` of each token, as lists.

    Raises:
        MiinbError: another engine runs the model.
        NonFinite: tokens' likelihoods are NaN or 0.
    """
    if not isinstance(executor, StepExecutor):
        raise MiinbError("; ".join(executor.info.plan.warnings) or "The optimized engine does not run it.")
    decoder = executor.compute.decoder
    kv_dtype = cache_dtype(job.config.kv_dtype, decoder.weights.dtype)
    losses, likeliest = token_losses(decoder, reading.windows, first=reading.first, kv_dtype=kv_dtype)
    mean = float(losses.double().mean())
    if not mean < LARGEST:
        raise NonFinite("The model gives tokens of the text a likelihood of 0, or one that is no number.")
    return {"perplexity": math.exp(mean), "losses": losses.tolist(), "likeliest": likeliest.tolist()}
