"""transformers' own continuous batching (`ContinuousBatchingManager`) as one more way to run the baseline."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from miinb.bench.headline.trace import Trace
from miinb.errors import MiinbError
from miinb.messages import SequenceRequest


def drive(executor: Any, requests: Sequence[SequenceRequest], limit_s: float) -> list[Trace]:
    """Run all requests at once with transformers' defaults; its CUDA graphs are captured before the clock starts.

    Args:
        executor: the baseline's, which holds the model.
        requests: greedy ones.
        limit_s: then what has not ended is cut.

    Raises:
        MiinbError: transformers failed on a request, or its thread ended.
    """
    hints = WorkloadHints(
        max_prompt_length=max(len(request.token_ids) for request in requests),
        max_generated_length=max(request.params.max_new_tokens for request in requests),
        num_requests=len(requests),
    )
    longest = hints.max_prompt_length + hints.max_generated_length
    settings = ContinuousBatchingConfig()
    if executor.info.device == "cpu":  # there its default is a cache as large as the machine's memory
        settings = ContinuousBatchingConfig(
            num_blocks=-(-longest // 256) * len(requests) + 1, max_batch_tokens=max(256, hints.max_prompt_length)
        )
    manager = executor.model.continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=settings,
        workload_hints=hints,
        timeout=10.0,
    )
    with torch.inference_mode(False), manager as running:
        _run(running, [_short(request) for request in requests[:2]], limit_s)
        return _run(running, requests, limit_s)


def _short(request: SequenceRequest) -> SequenceRequest:
    """A request of the warm-up: other tokens, few new ones."""
    params = request.params.model_copy(update={"max_new_tokens": 4})
    return dataclasses.replace(request, row_id=-1 - request.row_id, token_ids=request.token_ids[::-1], params=params)


def _run(manager: Any, requests: Sequence[SequenceRequest], limit_s: float) -> list[Trace]:
    traces: dict[str, Trace] = {}
    started = time.perf_counter()
    for request in requests:
        name = str(request.row_id)
        traces[name] = Trace.of(request, started)
        manager.add_request(
            list(request.token_ids), request_id=name, max_new_tokens=traces[name].wanted, streaming=True
        )
    left = len(requests)
    while left:
        output = manager.get_result(timeout=0.2)
        now = time.perf_counter() - started
        if now > limit_s:
            break
        if output is None:
            if not manager.is_running():
                raise MiinbError("transformers' continuous batching ended by itself.")
            continue
        if output.error:
            raise MiinbError(f"transformers' continuous batching failed: {output.error}")
        trace = traces[output.request_id]
        trace.times.extend([now] * (len(output.generated_tokens) - len(trace.times)))
        if output.is_finished() and not trace.ended:
            trace.end(now)
            left -= 1
    for name, trace in traces.items():
        if not trace.ended:
            manager.cancel_request(name)
            trace.end(limit_s, cut=True)
    return list(traces.values())
