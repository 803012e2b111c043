"""The measures of one complete answer of text."""

from __future__ import annotations

from typing import Any

import numpy as np

from miinb.bench.records import Record


def fill(record: Record, result: Any, arrivals: list[float], t_first: float | None, t_submit: float) -> None:
    """The measures of a complete answer; TTFT, TPOT and ITL by this process's clock."""
    usage, timing = result.usage, result.timing
    record.prompt_tokens = usage.prompt_tokens
    record.cached_tokens = usage.cached_tokens
    record.output_tokens = usage.output_tokens
    record.queue_s = timing.queue_s
    record.preprocess_s = timing.tokenize_s
    record.model_s = timing.model_s
    record.postprocess_s = timing.detokenize_s
    record.chunk_count = len(arrivals)
    record.finish_reason = result.finish_reasons[0] if result.finish_reasons else None
    if t_first is None and arrivals:
        t_first = arrivals[0]
    if t_first is not None:
        record.ttft_s = t_first - t_submit
        if usage.output_tokens > 1:
            record.tpot_s = (record.e2e_s - record.ttft_s) / (usage.output_tokens - 1)
    if len(arrivals) > 1:
        gaps = np.diff(np.asarray(arrivals))
        record.itl_p50_s, record.itl_max_s = float(np.median(gaps)), float(gaps.max())
        record.itl_s = [round(gap, 6) for gap in gaps.tolist()]
