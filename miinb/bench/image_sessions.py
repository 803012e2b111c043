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

    Args:
        folder: a pipeline's.
        arms: what `Session` takes besides, of each deployment by its name.
        device: of all.
        batches: pictures of a request.
        requests: of each arm and batch, after one that warms up.
        asked: further fields of `BenchConfig`, as num_inference_steps.
    """
    starts: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for arm, fields in arms.items():
            begin = time.perf_counter()
            session = Session(
                folder,
                "text-to-image",
                name=f"images-{arm.replace('=', '-')}-{os.getpid()}",
                device=device,
                max_batch=max(batches),
                **fields,
            )
            sessions[arm] = stack.enter_context(session)
            info = described(session)
            starts[arm] = {
                "ready_s": time.perf_counter() - begin,
                "phases_s": dict(info.phases_s),
                "load_peak_bytes": info.load_peak_bytes,
            }
        load = {"num_images_per_prompt": list(batches), "requests": requests, "warmup": 1, "run": "images-served"}
        runs = compare(sessions, {**load, **asked})
    for env in runs.env.values():
        for arm, facts in starts.items():
            env["arms"][arm] |= facts
    return runs
