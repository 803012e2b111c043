"""What Python costs a decode step: `python -m miinb.bench.scheduler_overhead [ROWS ...]`, no GPU needed.

Runs the step executor with launch-ahead over a decoder that computes nothing, so that what is timed is scheduling,
writing the inputs, reading the tokens and handing out the events: all that the host does while a GPU computes.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from miinb.config import EngineOptions, GenerationParams
from miinb.engine.executor import StepExecutor
from miinb.engine.kv_cache import CacheSize, KVCache
from miinb.engine.spec import DecoderSpec
from miinb.engine.step_batch import StepBatch
from miinb.messages import EngineInfo, Plan, SequenceRequest

VOCAB = 1000
PAGE_TOKENS = 16
PROMPT_TOKENS = 128
STEPS = 400


class NoModel:
    """Stands for the decoder; answers at once, always the same."""

    def __init__(self, rows: int) -> None:
        self._ids = torch.arange(rows)
        self._finite = torch.ones(rows, dtype=torch.bool)

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Not used: all rows are greedy."""
        return torch.zeros(len(batch.logit_rows), VOCAB)

    def greedy(self, batch: StepBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
        """The same tokens each time."""
        rows = len(batch.logit_rows)
        return self._ids[:rows], self._finite[:rows]


def make_executor(rows: int) -> StepExecutor:
    """An executor of so many rows over `NoModel`."""
    length = PROMPT_TOKENS + STEPS + 200
    spec = DecoderSpec(
        vocab_size=VOCAB, hidden_size=1, layers=1, heads=1, kv_heads=1, head_size=1, inner_size=1, scale=1.0,
        max_length=length, norm="rms", eps=1e-5, activation="silu",
    )  # fmt: skip
    pages = rows * -(-length // PAGE_TOKENS)
    size = CacheSize(pages, PAGE_TOKENS, length, rows, pages * PAGE_TOKENS * 8)
    info = EngineInfo(
        replica=0, model="", task="text-generation", engine="optimized", dtype="fp32", device="cpu", vocab_size=VOCAB,
        max_length=length, max_batch=rows, eos_token_ids=(), tokenizer_folder="", plan=Plan("optimized", "cpu", "fp32"),
    )  # fmt: skip
    cache = KVCache(spec, size, torch.float32, torch.device("cpu"))
    model: Any = NoModel(rows)
    executor = StepExecutor(info=info, decoder=model, cache=cache, options=EngineOptions(), launch_ahead=True)
    params = GenerationParams(max_new_tokens=STEPS + 100, seed=0)
    for row in range(rows):
        executor.submit(SequenceRequest(row, [row % VOCAB] * PROMPT_TOKENS, params, time.monotonic()))
    return executor


def measure(rows: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each of `STEPS` decode steps: of this thread's processor time, and of the clock."""
    executor = make_executor(rows)
    events = 0

    def count(event: object) -> None:
        nonlocal events
        events += 1

    while executor.status()["waiting"] or executor.status()["steps"] < 20:
        executor.step(count, lambda: None)
    processor, clock = [], []
    for _ in range(STEPS):
        start, start_clock = time.thread_time(), time.perf_counter()
        executor.step(count, lambda: None)
        processor.append((time.thread_time() - start) * 1e3)
        clock.append((time.perf_counter() - start_clock) * 1e3)
    return processor, clock


def main() -> None:
    """Print a line for each number of rows."""
    torch.set_num_threads(1)
    print("A decode step without its model, in milliseconds of processor time (and of the clock, with what else runs)")
    print("rows   median      p99   median     p99")
    for rows in [int(text) for text in sys.argv[1:]] or [1, 8, 32, 128]:
        columns = []
        for times in measure(rows):
            columns += [statistics.median(times), statistics.quantiles(times, n=100)[-1]]
        print(f"{rows:4d}   {columns[0]:6.3f}   {columns[1]:6.3f}   ({columns[2]:6.3f}   {columns[3]:6.3f})")


if __name__ == "__main__":
    main()
