"""What every rank does with a step: bring its plan to the device, run the decoder, draw the tokens.

Rank 0's executor and the followers of a tensor-parallel replica share it: both compute from a `StepPlan`, and as their
logits and their noise are the same they draw the same tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from miinb.engine.decoder import Decoder, StepBatch
from miinb.engine.inputs import StepInputs
from miinb.engine.kv_cache import KVCache
from miinb.engine.rows import Row, StepPlan
from miinb.engine.sampling import Needs, Sampled, Sampler

#: What a step may raise without the rank being broken.
STEP_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError)


class Runner(Protocol):
    """Runs the decoder on a step's batch: `EagerRunner`, or a runner of captured CUDA graphs."""

    def forward(self, batch: StepBatch) -> Tensor:
        """Logits [L, vocab]."""

    def greedy(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Most likely tokens [L] int64, and [L] bool: whether the row's logits are finite."""


class EagerRunner:
    """Calls the decoder."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache

    def forward(self, batch: StepBatch) -> Tensor:
        """See `Runner`."""
        return self._decoder.forward(batch, self._cache)

    def greedy(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """See `Runner`."""
        return self._decoder.greedy(batch, self._cache)


class StepCompute:
    """The step's inputs, the decoder and the sampler of one rank.

    Args:
        decoder: the model.
        cache: its KV cache.
        max_batch: most rows, and the number of slots.
        max_length: longest row.
        max_step_tokens: most tokens in a step.
        vocab_size: tokens in the vocabulary.
        runner: how the decoder is run; None calls it eagerly.
        max_places: most rows of a batch; a row with a draft has several. None: `max_batch`.

    Attributes:
        inputs: the steps' memory.
        sampler: the rows' parameters.
        keeps_tokens: each slot's newest token stays on the device, for steps whose tokens the host does not know.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        *,
        max_batch: int,
        max_length: int,
        max_step_tokens: int,
        vocab_size: int,
        keeps_tokens: bool,
        runner: Runner | None = None,
        max_places: int | None = None,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.device = cache.k[0].device
        self.runner: Runner = runner or EagerRunner(decoder, cache)
        self.inputs = StepInputs(
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            max_length=max_length,
            page_tokens=cache.page_tokens,
            device=self.device,
            max_places=max_places,
        )
        self.sampler = Sampler(max_batch, vocab_size, self.device)
        self.keeps_tokens = keeps_tokens

    def admit(self, plan: StepPlan) -> Needs:
        """Take over the tokens and parameters of the rows that came into a slot. Returns what the step's rows want."""
        for source, target, tokens in plan.copies:
            self.cache.copy(source, target, tokens)
        for row in plan.admitted:
            self.sampler.admit(row)
        return self.sampler.needs(sampled_rows(plan))

    def blank(self, pages: list[int]) -> None:
        """Zero pages that may hold NaN."""
        for page in pages:
            for layer in (*self.cache.k, *self.cache.v):
                layer[page].zero_()

    def run(self, plan: StepPlan, needs: Needs) -> Sampled:
        """Compute a step.

        Args:
            plan: the step.
            needs: what any of its rows wants.

        Returns:
            The new tokens of the plan's rows that sample, on the device.
        """
        batch = self.inputs.write(plan)
        slots = self.inputs.sample_slots
        rows = sampled_rows(plan)
        if not rows:
            self.runner.greedy(batch)
            return Sampled(slots, slots.bool())
        if needs == Needs.NOTHING:
            chosen = Sampled(*self.runner.greedy(batch))
        else:
            logits = self.runner.forward(batch)
            places = batch.positions[batch.logit_rows] + 1
            lengths = [end for end, samples in zip(plan.ends, plan.samples, strict=True) if samples]
            chosen = self.sampler.choose(logits, rows, lengths, places, slots, needs)
        if self.keeps_tokens:
            self.inputs.last_tokens.index_copy_(0, slots, chosen.token_ids)
        return chosen


def sampled_rows(plan: StepPlan) -> list[Row]:
    """The rows of a plan that get a token."""
    if all(plan.samples):
        return plan.rows
    return [row for row, samples in zip(plan.rows, plan.samples, strict=True) if samples]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def is_device_lost(error: BaseException) -> bool:
    """Whether a CUDA error makes every later call in this process fail too."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
