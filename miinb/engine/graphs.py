"""CUDA graphs of decode steps: what Python costs a step becomes one launch.

A graph is keyed by its number of rows alone. Lengths, page tables and tokens are data that it reads from the memory of
`inputs.StepInputs`, which has the same address in every step; a step of fewer rows is padded. Prompts run eagerly.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from miinb.engine.decoder import Decoder, StepBatch
from miinb.engine.inputs import StepInputs
from miinb.engine.kv_cache import KVCache
from miinb.kernels.head import argmax

#: Captures end when they have taken so long or so much memory; steps without a graph are padded to the next or eager.
MOST_SECONDS = 3.0
MOST_BYTES = 1 << 30


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: Tensor  # [rows, vocab]
    token_ids: Tensor  # [rows] int64
    finite: Tensor  # [rows] bool


class GraphRunner:
    """Runs decode steps as CUDA graphs, and all others eagerly (see `executor.Runner`).

    Args:
        decoder: the model.
        cache: its KV cache.
        inputs: the steps' memory; its `buckets` are set to the graphs' sizes.
        max_batch: most rows of a step.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, inputs: StepInputs, max_batch: int) -> None:
        self._decoder = decoder
        self._cache = cache
        self._captured: dict[int, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.seconds = 0.0  # of the captures alone: the first start on a machine also compiles kernels
        self.bytes = 0
        free = torch.cuda.mem_get_info()[0]
        for rows in capture_order(max_batch):
            if self.seconds > MOST_SECONDS or self.bytes > MOST_BYTES:
                break
            self._captured[rows] = self._capture(inputs, rows)
            self.bytes = max(0, free - torch.cuda.mem_get_info()[0])
        inputs.buckets = sorted(self._captured)

    def __str__(self) -> str:
        sizes = ", ".join(map(str, sorted(self._captured)))
        return f"decode steps of {sizes} rows, captured in {self.seconds:.1f} s, {self.bytes / 2**20:.0f} MiB"

    @torch.inference_mode()
    def _capture(self, inputs: StepInputs, rows: int) -> _Captured:
        batch = inputs.bucket_batch(rows)
        batch.lengths.zero_()  # of padding alone: nothing is written to the cache
        batch.slots.fill_(-1)
        batch.positions.zero_()
        for tensor in (batch.query_start, batch.logit_rows):
            tensor.copy_(torch.arange(tensor.shape[0]))
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            self._step(inputs, batch, rows)  # compiles kernels, and allocates what must outlive a capture
            self._stream.synchronize()
            started = time.monotonic()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool)
            try:
                logits, token_ids, finite = self._step(inputs, batch, rows)
            finally:
                graph.capture_end()
            self.seconds += time.monotonic() - started
        return _Captured(graph, logits, token_ids, finite)

    def _step(self, inputs: StepInputs, batch: StepBatch, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        inputs.look_up(rows)
        logits = self._decoder.forward(batch, self._cache)
        return logits, *argmax(logits)

    def forward(self, batch: StepBatch) -> Tensor:
        """See `executor.Runner`."""
        captured = self._replay(batch)
        if captured is None:
            return self._decoder.forward(batch, self._cache)
        return captured.logits[: batch.lengths.shape[0]]

    def greedy(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """See `executor.Runner`."""
        captured = self._replay(batch)
        if captured is None:
            return self._decoder.greedy(batch, self._cache)
        rows = batch.lengths.shape[0]
        return captured.token_ids[:rows], captured.finite[:rows]

    def _replay(self, batch: StepBatch) -> _Captured | None:
        """The results of the batch's graph, valid until the next step; None: it has none."""
        captured = self._captured.get(batch.bucket)
        if captured is not None:
            captured.graph.replay()
        return captured


def capture_order(max_batch: int) -> list[int]:
    """Rows of the graphs: powers of two up to 16, then every 16th. The largest first, as the others fit in its memory.

    After it come the small ones: where time ends the captures, it is the steps between that are padded further.
    """
    sizes = sorted({n for n in (1, 2, 4, 8, *range(16, max_batch, 16)) if n < max_batch})
    return [max_batch, *sizes]
