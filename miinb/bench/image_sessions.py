"""Text to image behind its server: engines on one folder, their starts, and equal work for all."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miinb.bench.records import Runs
from miinb.bench.runner import compare
from miinb.bench.startup import described
from miinb.session import Session


def measure(
    folder: Path,
    arms: Mapping[str, Mapping[str, Any]],
    *,
    device: str,
    batches: Sequence[int],
    requests: int,
    asked: Mapping[str, Any],
) -> Runs:
    """Start deployments one after the other and compare them: batches as points, one request in flight.

    On a GPU the optimized engine starts twice: with no compiled kernel, and with those of its first start.

    Args:
        folder: a pipeline's.
        arms: what `Session` takes besides, of each deployment by its name.
        device: of all.
        batches: pictures of a request.
        requests: of each arm and batch, after one that warms up.
        asked: further fields of `BenchConfig`, as num_inference_steps.
    """
    starts: dict[str, dict[str, Any]] = {arm: {} for arm in arms}
    with contextlib.ExitStack() as stack:
        if device == "cuda":  # elsewhere nothing is compiled
            os.environ["TRITON_CACHE_DIR"] = str(folder.parent / "kernels")
        sessions: dict[str, Session] = {}
        for arm, fields in arms.items():
            name = f"images-{arm.replace('=', '-')}-{os.getpid()}"
            options = {"name": name, "device": device, "max_batch": max(batches), **fields}
            if arm == "optimized" and device == "cuda":
                _started(folder, options, starts[arm], "cold_").stop()
            sessions[arm] = stack.enter_context(_started(folder, options, starts[arm]))
        load = {"num_images_per_prompt": list(batches), "requests": requests, "warmup": 1, "run": "images-served"}
        runs = compare(sessions, {**load, **asked})
    for env in runs.env.values():
        for arm, facts in starts.items():
            env["arms"][arm] |= facts
    return runs


def _started(folder: Path, options: Mapping[str, Any], facts: dict[str, Any], kind: str = "") -> Session:
    """A deployment of the folder; the facts get how long its start took, and its phases, under names of this kind."""
    begin = time.perf_counter()
    session = Session(folder, "text-to-image", **options)
    facts[f"{kind}ready_s"] = time.perf_counter() - begin
    info = described(session)
    facts |= {f"{kind}phases_s": dict(info.phases_s), f"{kind}load_peak_bytes": info.load_peak_bytes}
    return session
