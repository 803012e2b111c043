"""The step executor: scheduler, fused decoder and sampling, one step at a time.

On a GPU a step is launched before the tokens of the step before it are read ("launch-ahead"): tokens stay on the GPU
for the next step, the host reads them from pinned memory one step later, and the GPU does not wait for Python. On a CPU
a step is computed and read at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from miinb.config import EngineOptions
from miinb.engine.compute import STEP_ERRORS, Runner, StepCompute, is_device_lost, request_error, sampled_rows
from miinb.engine.decoder import Decoder
from miinb.engine.followers import Followers
from miinb.engine.kv_cache import KVCache
from miinb.engine.rows import Row, StepPlan
from miinb.engine.sampling import Landing, Sampled, read_logprobs
from miinb.engine.scheduler import Scheduler
from miinb.errors import InvalidRequest
from miinb.image_messages import PaintedEvent, PaintProgress, PaintRequest
from miinb.messages import (
    EncodedEvent,
    EncodeRequest,
    EngineInfo,
    Event,
    FinishReason,
    SequenceRequest,
)

log = logging.getLogger(__name__)

Emit = Callable[[Event | EncodedEvent | PaintProgress | PaintedEvent], None]
Poll = Callable[[], None]


class Executor(Protocol):
    """What rank 0's loop drives: this module's `StepExecutor`, or that of another task or engine."""

    info: EngineInfo

    def submit(self, request: SequenceRequest) -> None:
        """Queue a row. Raises MiinbError when it cannot be served."""

    def encode(self, request: EncodeRequest) -> None:
        """Queue texts for an encoder. Raises MiinbError when they cannot be served."""

    def paint(self, request: PaintRequest) -> None:
        """Queue a picture. Raises MiinbError when it cannot be served."""

    def cancel(self, row_id: int, reason: FinishReason) -> None:
        """End a row early; one that has ended is left alone."""

    def step(self, emit: Emit, poll: Poll) -> None:
        """Compute one step (or batch) and emit what came out; `poll` is called within long ones."""

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""

    def status(self) -> dict[str, Any]:
        """Numbers of this moment: running, waiting, KV cache use, memory."""

    def close(self) -> None:
        """Let go of the device's memory."""


@dataclass(slots=True)
class Flight:
    """A launched step whose results have not been read."""

    number: int
    plan: StepPlan
    rows: list[Row]  # those that get a token
    chosen: Sampled  # on the host once `landed`
    landed: torch.cuda.Event | None


class StepExecutor:
    """Continuous batching over the fused decoder.

    Args:
        info: what the frontend is told; `max_batch`, `max_length`, `vocab_size` and `eos_token_ids` count here.
        decoder: the model.
        cache: its KV cache.
        options: `max_step_tokens`, `max_queue` and `prefix_cache` count here.
        runner: how the decoder is run; None calls it eagerly.
        launch_ahead: None: on a GPU.
        followers: the replica's other ranks, which compute the same steps.
    """

    def __init__(
        self,
        *,
        info: EngineInfo,
        decoder: Decoder,
        cache: KVCache,
        options: EngineOptions,
        runner: Runner | None = None,
        launch_ahead: bool | None = None,
        followers: Followers | None = None,
    ) -> None:
        self.info = info
        self.device = cache.k[0].device
        self._cache = cache
        self._ahead = self.device.type == "cuda" if launch_ahead is None else launch_ahead
        self.scheduler = Scheduler(
            pages=cache.pages,
            page_tokens=cache.page_tokens,
            max_batch=info.max_batch,
            max_length=info.max_length,
            vocab_size=info.vocab_size,
            max_step_tokens=options.step_tokens(self.device.type),
            max_queue=options.max_queue,
            eos_token_ids=info.eos_token_ids,
            prefix_cache=options.prefix_cache,
            speculative=options.speculative == "prompt_lookup",
        )
        self.compute = StepCompute(
            decoder,
            cache,
            max_batch=self.scheduler.max_batch,
            max_length=info.max_length,
            max_step_tokens=self.scheduler.max_step_tokens,
            vocab_size=info.vocab_size,
            keeps_tokens=self._ahead,
            group=decoder.group if followers else None,
            runner=runner,
            max_places=self.scheduler.max_places,
        )
        self._followers = followers
        self._blank: list[int] = []  # pages to be zeroed in the next step
        self._flight: Flight | None = None
        self._steps = 0
        self._landing = [Landing(self.scheduler.max_places, self.device) for _ in range(2)]

    def submit(self, request: SequenceRequest) -> None:
        """See `Executor`. Raises InvalidRequest, PromptTooLong, QueueFull."""
        if request.params.num_beams > 1:
            raise InvalidRequest(
                "num_beams: the optimized engine has no beam search.", hint="A session with engine='baseline' has."
            )
        self.scheduler.submit(request)

    def encode(self, request: EncodeRequest) -> None:
        """Refuse: this engine generates. Raises InvalidRequest."""
        raise InvalidRequest(f"This deployment serves {self.info.task}.", hint="Use generate or stream.")

    def paint(self, request: PaintRequest) -> None:
        """Refuse, as `encode`. Raises InvalidRequest."""
        raise InvalidRequest(f"This deployment serves {self.info.task}.", hint="Use generate or stream.")

    def cancel(self, row_id: int, reason: FinishReason) -> None:
        """See `Executor`; the row's slot is free at the next step."""
        self.scheduler.cancel(row_id, reason, time.monotonic())

    @property
    def busy(self) -> bool:
        """Whether rows wait or run, or a step's results are to be read."""
        return self._flight is not None or self.scheduler.busy

    def status(self) -> dict[str, Any]:
        """See `Executor`."""
        pool, drafts = self.scheduler.pool, self.scheduler.drafts
        return {
            "running": self.scheduler.running,
            "waiting": self.scheduler.waiting,
            "kv_pages": pool.pages,
            "kv_pages_used": pool.used,
            "kv_cache_bytes": self._cache.size_bytes,
            "preemptions": self.scheduler.preemptions,
            "draft_tokens": drafts.proposed,
            "accepted_tokens": drafts.accepted,
            "steps": self._steps,
        }

    def close(self) -> None:
        """See `Executor`."""
        self._flight = None
        if self._followers is not None:
            self._followers.close()
        self.compute.close()

    @torch.inference_mode()
    def step(self, emit: Emit, poll: Poll) -> None:
        """Launch the next step, then read the one before it (on a CPU: compute and read one step)."""
        if self._flight is not None and self.scheduler.drafting:  # a draft goes on from tokens that the host must know
            self._land(self._flight)
            self._flight = None
        plan = self.scheduler.schedule(time.monotonic())
        launched = self._launch(plan) if plan else None
        before, self._flight = self._flight, launched if self._ahead else None
        for flight in (before, launched if not self._ahead else None):
            if flight is not None:
                self._land(flight)
        for event in self.scheduler.take_events():
            emit(event)

    def _launch(self, plan: StepPlan) -> Flight | None:
        """Start a step; None if it raised, and then the rows concerned have failed."""
        self._steps += 1
        self._blank += self.scheduler.take_blank()
        try:
            needs = self.compute.prepare(plan, self._blank)
            if self._followers is not None:
                self._followers.publish(self._steps, plan, needs, self._blank)
            self._blank = []
            return self._take_off(plan, self.compute.run(plan, needs))
        except STEP_ERRORS as error:
            if self.device.type == "cuda" and is_device_lost(error):
                raise  # nothing on this GPU works any more in this process; the supervisor starts another
            log.exception("a step of %d rows and %d tokens raised", len(plan.rows), plan.tokens)
            self._blame(plan, error)
            return None

    def _take_off(self, plan: StepPlan, chosen: Sampled) -> Flight:
        rows = sampled_rows(plan)
        chosen = self._landing[self._steps % 2].receive(chosen)
        if self.device.type != "cuda":
            return Flight(self._steps, plan, rows, chosen, None)
        landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        landed.record()
        return Flight(self._steps, plan, rows, chosen, landed)

    def _land(self, flight: Flight) -> None:
        """Read a step's results."""
        if flight.landed is not None:
            flight.landed.synchronize()
        plan = flight.plan
        if self._followers is not None and (failure := self._followers.failure(flight.number)):
            self._blame(plan, failure)
            return
        token_ids, finite = flight.chosen.token_ids.tolist(), flight.chosen.finite.tolist()
        found = read_logprobs(flight.chosen, flight.rows)
        if len(flight.rows) == len(plan.rows):
            self.scheduler.complete(plan, token_ids, finite, time.monotonic(), found)
            return
        place = iter(range(len(token_ids)))
        at = [next(place) if samples else -1 for samples in plan.samples]
        logprobs = {i: found[k] for i, k in enumerate(at) if k in found}
        self.scheduler.complete(
            plan,
            [token_ids[k] if k >= 0 else -1 for k in at],
            [k < 0 or finite[k] for k in at],
            time.monotonic(),
            logprobs,
        )

    def _blame(self, plan: StepPlan, error: Exception) -> None:
        """It is the fault of a row whose prompt was in the step, as the others have computed before; else of any."""
        admitted = set(plan.admitted)
        fresh = [row for row, count in zip(plan.rows, plan.counts, strict=True) if count > 1 or row in admitted]
        if self._followers is not None:
            self._followers.forget(plan.rows)
            if self._flight is not None and any(row in self._flight.plan.rows for row in plan.rows):
                fresh = plan.rows  # the next step has been launched on what this one did not compute
        self.scheduler.abandon(plan, set(fresh or plan.rows), request_error(error))
