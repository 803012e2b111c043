"""What every rank does with a step: bring its plan to the device, run the decoder, draw the tokens.

Rank 0's executor and the followers of a tensor-parallel replica share it: both compute from a `StepPlan`, and as their
logits and their noise are the same they draw the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from miinb.engine.decoder import Decoder
from miinb.engine.inputs import StepInputs
from miinb.engine.kv_cache import KVCache
from miinb.engine.parallel import Group, PeerLost
from miinb.engine.rows import Row, StepPlan
from miinb.engine.sampling import Needs, Sampled, Sampler
from miinb.engine.step_batch import StepBatch
from miinb.errors import MiinbError, OutOfMemory

OnError = Callable[[Exception], None]

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
        keeps_tokens: see below.
        group: the ranks that share the model.
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
        group: Group | None = None,
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
        self._group = group
        self._captured = False  # whether the step is run as a CUDA graph

    def prepare(self, plan: StepPlan, blank: Sequence[int]) -> Needs:
        """Zero the pages that may hold NaN, and take over tokens and parameters of the rows that came into a slot.

        Returns:
            What any row that gets a token wants.
        """
        for page in blank:
            self.cache.blank(page)
        for source, target, tokens in plan.copies:
            self.cache.copy(source, target, tokens)
        for row in plan.admitted:
            self.sampler.admit(row)
        return self.sampler.needs(sampled_rows(plan))

    def run(self, plan: StepPlan, needs: Needs) -> Sampled:
        """Compute a step that has been prepared (on rank 0).

        Returns:
            The new tokens of the plan's rows that sample, on the device.

        Raises:
            PeerLost: another rank is gone.
        """
        with self._in_step(plan, needs, lambda error: None):
            return self._compute(plan, needs)

    def follow(self, plan: StepPlan, needs: Needs, blank: Sequence[int], on_error: OnError) -> None:
        """Prepare and compute a step (on a follower); `on_error` hears what it raises before the other ranks can."""
        with self._in_step(plan, needs, on_error):
            self.prepare(plan, blank)
            self._compute(plan, needs)

    def close(self) -> None:
        """Let go of the device's memory."""
        self.cache.close()

    def _compute(self, plan: StepPlan, needs: Needs) -> Sampled:
        batch = self.inputs.write(plan)
        self._captured = bool(batch.bucket)
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

    @contextmanager
    def _in_step(self, plan: StepPlan, needs: Needs, on_error: OnError) -> Iterator[None]:
        """See `in_step`."""
        if self._group is None:
            yield
            return

        def stand_in() -> None:
            rows = sampled_rows(plan)
            whole = bool(rows) and needs != Needs.NOTHING
            self.decoder.stand_in(plan.tokens, max(len(rows), 1), whole=whole)

        self._captured = self.device.type == "cuda"  # until the step's inputs say otherwise
        with in_step(self._group, captured=lambda: self._captured, on_error=on_error, stand_in=stand_in):
            yield


@contextmanager
def in_step(
    group: Group, *, captured: Callable[[], bool], on_error: OnError, stand_in: Callable[[], None]
) -> Iterator[None]:
    """If this rank fails within a step, take part in what is left of its collectives: the others wait in them.

    Args:
        group: the ranks that compute the step.
        captured: whether the step is run as a CUDA graph.
        on_error: hears what was raised before the other ranks can.
        stand_in: takes part in the collectives that are left, with zeros.

    Raises:
        PeerLost: that could not be done, so this rank cannot go on.
    """
    group.begin()
    try:
        yield
    except STEP_ERRORS as error:
        if captured():  # one launch: how much of its collectives it has done is not known
            raise PeerLost("A captured step failed.") from error
        on_error(error)
        try:
            stand_in()
        except STEP_ERRORS as second:
            raise PeerLost("A failed step could not be ended.") from second
        raise


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


def request_error(error: Exception) -> MiinbError:
    """What the user of a failed request is told: no paths, no traceback (the rank's log has it)."""
    if isinstance(error, MiinbError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(
            "The device ran out of memory in this request's step.",
            hint="Send fewer or shorter prompts at once, or start with a smaller options.max_step_tokens.",
        )
    return MiinbError(
        f"The engine failed on this request ({type(error).__name__}).", hint="The deployment's logs say where."
    )
