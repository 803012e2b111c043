"""CUDA graphs of steps: what Python costs a step becomes one launch.

A graph is keyed by its packed tokens alone: rows in a step that only decodes, tokens in one with prompts. Lengths, page
tables and tokens are data that it reads from the memory of `inputs.StepInputs`, which has the same address in every
step; a smaller step is padded. A decode graph ends in logits and tokens, a mixed one before the head, which then runs
for the rows that need it. Steps with prompts for which padding would cost more than it saves run eagerly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from miinb.engine.decoder import Decoder, Stream
from miinb.engine.inputs import SMALL_STEP, StepInputs
from miinb.engine.kv_cache import KVCache
from miinb.engine.parallel import Group
from miinb.engine.step_batch import StepBatch
from miinb.wording import size_words

#: Captures end when they have taken so long or so much memory; steps without a graph are padded to the next or eager.
MOST_SECONDS = 3.0
MOST_BYTES = 1 << 30
#: Steps of more tokens run eagerly: their graphs would take memory and save no time.
MOST_TOKENS = 2048


Result = TypeVar("Result")
Replay = Callable[[], None]


class Recorder:
    """Records steps as CUDA graphs that share their memory.

    Args:
        group: the ranks that capture and replay together, if the steps hold collectives. NCCL's watchdog, a thread of
            its own, looks after its events at any time, which a capture takes for an error unless it watches its own
            thread alone.
        most_bytes: that they may take.

    Attributes:
        seconds: of the recordings alone: the first start on a machine also compiles kernels.
        bytes: of memory that they took; until `settle`, with what the steps before them left in PyTorch's cache.
    """

    def __init__(self, *, group: Group | None = None, most_bytes: int = MOST_BYTES) -> None:
        self._group = group
        self._mode = "thread_local" if group is not None else "global"
        self._most_bytes = most_bytes
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        self._before = torch.cuda.memory_reserved()
        self.seconds = 0.0
        self.bytes = 0

    def record(self, step: Callable[[], Result]) -> tuple[Replay, Result]:
        """What replays the step, and the tensors that a replay writes."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            step()  # compiles kernels, and allocates what must outlive a capture
            self._stream.synchronize()
            started = time.monotonic()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode=self._mode)
            try:
                results = step()
            finally:
                graph.capture_end()
            self.seconds += time.monotonic() - started
        self._measure()
        return graph.replay, results

    def full(self) -> bool:
        """Whether the graphs have taken the time or the memory that they may: on all ranks, as soon as on one."""
        if self.bytes > self._most_bytes:
            self.settle()
        full = self.seconds > MOST_SECONDS or self.bytes > self._most_bytes
        return full if self._group is None else not self._group.least(int(not full), torch.device("cuda"))

    def settle(self) -> None:
        """Give back what is no graph's: no later step runs on this stream, whose cached memory serves no other."""
        torch.cuda.empty_cache()
        self._measure()

    def _measure(self) -> None:
        self.bytes = max(0, torch.cuda.memory_reserved() - self._before)  # other processes may use the GPU too


@dataclass(slots=True)
class _Decode:
    replay: Replay
    token_ids: Tensor  # [rows] int64
    finite: Tensor  # [rows] bool


@dataclass(slots=True)
class _Mixed:
    replay: Replay
    stream: Stream  # [tokens, hidden]


class GraphRunner:
    """Runs steps as CUDA graphs where there is one, and all others eagerly (see `compute.Runner`).

    Args:
        decoder: the model.
        cache: its KV cache.
        inputs: the steps' memory; its `buckets` and `mixed_buckets` are set to the graphs' sizes.
        max_batch: most rows of a step.
        max_step_tokens: most tokens of a step.
        recorder: None: `Recorder`.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        inputs: StepInputs,
        max_batch: int,
        max_step_tokens: int,
        recorder: Recorder | None = None,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._decodes: dict[int, _Decode] = {}
        self._mixed: dict[int, _Mixed] = {}
        self._recorder = recorder or Recorder(group=decoder.group)
        head = decoder.weights.head.weight
        # Of the rank's part of the vocabulary. All graphs write here: one each would be half a gigabyte.
        self._logits = torch.empty((max_batch, head.shape[0]), dtype=decoder.weights.dtype, device=head.device)
        # The largest of all first: the others fit in its memory.
        *small, largest = mixed_sizes(max_step_tokens)
        captures: list[tuple[Callable[[StepInputs, int], None], int]] = [(self._capture_mixed, largest)]
        captures += [(self._capture_decode, rows) for rows in capture_order(max_batch)]
        captures += [(self._capture_mixed, tokens) for tokens in small]
        for capture, size in captures:
            if self._recorder.full():
                break
            capture(inputs, size)
        self._recorder.settle()
        inputs.buckets = sorted(self._decodes)
        inputs.mixed_buckets = sorted(self._mixed)

    @property
    def bytes(self) -> int:
        """Memory of the graphs."""
        return self._recorder.bytes

    def __str__(self) -> str:
        rows, tokens = (", ".join(map(str, sorted(sizes))) for sizes in (self._decodes, self._mixed))
        words = f"steps of {rows} rows" + (f" and of {tokens} tokens with prompts" if tokens else "")
        return f"{words}, captured in {self._recorder.seconds:.1f} s, {size_words(self._recorder.bytes)}"

    @torch.inference_mode()
    def _capture_decode(self, inputs: StepInputs, rows: int) -> None:
        batch = inputs.decode_batch(rows)
        _blank(batch)
        batch.query_start.copy_(torch.arange(batch.query_start.shape[0]))

        def step() -> tuple[Tensor, Tensor]:
            inputs.look_up(rows)
            stream = self._decoder.body(batch, self._cache)
            return self._decoder.choose(self._decoder.own_logits(stream, None, out=self._logits[:rows]))

        replay, results = self._recorder.record(step)
        self._decodes[rows] = _Decode(replay, *results)

    @torch.inference_mode()
    def _capture_mixed(self, inputs: StepInputs, tokens: int) -> None:
        batch = inputs.mixed_batch(tokens)
        _blank(batch)
        batch.query_start.zero_()
        replay, stream = self._recorder.record(lambda: self._decoder.body(batch, self._cache))
        self._mixed[tokens] = _Mixed(replay, stream)

    def forward(self, batch: StepBatch) -> Tensor:
        """See `compute.Runner`."""
        if not batch.bucket:
            return self._decoder.forward(batch, self._cache)
        if batch.max_query == 1:
            self._decode(batch)
            return self._decoder.whole(self._logits[: batch.lengths.shape[0]])
        return self._decoder.logits(self._body(batch), batch.logit_rows)

    def greedy(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """See `compute.Runner`."""
        if not batch.bucket:
            return self._decoder.greedy(batch, self._cache)
        if batch.max_query == 1:
            captured, rows = self._decode(batch), batch.lengths.shape[0]
            return captured.token_ids[:rows], captured.finite[:rows]
        return self._decoder.best(self._body(batch), batch.logit_rows)

    def _decode(self, batch: StepBatch) -> _Decode:
        """The results of the batch's graph, valid until the next step."""
        captured = self._decodes[batch.bucket]
        captured.replay()
        return captured

    def _body(self, batch: StepBatch) -> Stream:
        """The stream of a step with prompts, valid until the next step."""
        captured = self._mixed[batch.bucket]
        captured.replay()
        return captured.stream


def _blank(batch: StepBatch) -> None:
    """Padding alone: nothing is written to the cache."""
    batch.lengths.zero_()
    batch.slots.fill_(-1)
    batch.positions.zero_()


def mixed_sizes(max_step_tokens: int) -> list[int]:
    """Tokens of the graphs of steps with prompts, ascending: close together where a step is short, none where it is
    so long that the GPU computes while Python launches.
    """
    most = min(max_step_tokens, MOST_TOKENS)
    small = (32, 64, 128, 192, 256, 384, SMALL_STEP)
    large = range(2 * SMALL_STEP, most, SMALL_STEP)
    return sorted({n for n in (*small, *large) if n < most} | {most})


def capture_order(max_batch: int) -> list[int]:
    """Rows of the graphs: powers of two up to 16, then every 16th. The largest first, as the others fit in its memory.

    After it come the small ones: where time ends the captures, it is the steps between that are padded further.
    """
    sizes = sorted({n for n in (1, 2, 4, 8, *range(16, max_batch, 16)) if n < max_batch})
    return [max_batch, *sizes]
