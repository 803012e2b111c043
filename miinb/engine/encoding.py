"""The executor of encoders: requests of tokenized texts in, numbers out.

A step is one forward of an encoder and the reduction of its outputs. What waits when a step begins is in it; what comes
meanwhile makes the next one, so that load makes batches and an idle engine lets nobody wait. On a GPU a step is
launched before the results of the one before it are read, which come to the host through pinned memory; on a CPU a
step is computed and read at once.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from miinb.engine.compute import STEP_ERRORS, is_device_lost
from miinb.engine.encode_followers import EncodeFollowers
from miinb.engine.encode_queue import Bounds, EncodeQueue, EncodeStep, Job, Piece, make_job
from miinb.engine.encoder import EncoderBatch
from miinb.engine.encoder_inputs import EncoderInputs
from miinb.engine.executor import Emit, Poll
from miinb.engine.heads import BestShares, Reduced, reduce
from miinb.engine.lockstep import Lead, settled
from miinb.engine.parallel import PeerLost
from miinb.engine.reduction import Reduction, check_task, parse_reduction
from miinb.errors import DeadlineExceeded, InvalidRequest, MiinbError, NonFinite, OutOfMemory, QueueFull
from miinb.image_messages import PaintRequest
from miinb.kernels import reference
from miinb.messages import (
    EncodedEvent,
    EncodeRequest,
    EngineInfo,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    SequenceRequest,
)

log = logging.getLogger(__name__)

#: So many results of a step have a place of their own in pinned memory.
FEW_NUMBERS = 1 << 14
#: An answer of more bytes would not fit a frame to the frontend.
MAX_ANSWER_BYTES = 192 << 20


class EncoderModel(Protocol):
    """An encoder with its head: `encoder.Encoder`, its graphs, or `transformers_encoder.TransformersEncoder`."""

    def outputs(self, batch: EncoderBatch) -> Tensor:
        """The head's logits of the batch's rows, [L, C] on the device; for feature-extraction the last hidden states.

        They hold until the next call. A graph gives more rows than asked for, of which the first count.
        """


class Reducing(Protocol):
    """What computes and reduces a step in one: the graphs of an encoder."""

    def reduced(self, batch: EncoderBatch, reduction: Reduction) -> Reduced | None:
        """The results of the batch, in the same rows as `heads.reduce` would give, and perhaps more; they hold until
        the next call. None: it cannot, and nothing has been computed.
        """


class _Turn:
    """When the GPU begins and ends a step, and where its results come to. Two are used in turns.

    To make one takes longer than to read it.
    """

    def __init__(self) -> None:
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._memory = torch.empty(FEW_NUMBERS, pin_memory=True)

    def place(self, shape: tuple[int, ...]) -> Tensor | None:
        """Pinned fp32 of this shape; None: it holds not so much."""
        size = math.prod(shape)
        return self._memory[:size].view(shape) if size <= FEW_NUMBERS else None


@dataclass(slots=True)
class _Flight:
    """A launched step whose results have not been read."""

    step: EncodeStep
    results: list[tuple[list[int], Reduced]]  # on the host once the turn has ended
    t_launch: float
    turn: _Turn | None
    number: int  # as the followers know it
    void: set[Job] = field(default_factory=set)  # whose earlier pieces have failed: these come again, too

    def wait(self) -> float:
        """Seconds that it took."""
        if self.turn is None:
            return time.monotonic() - self.t_launch
        self.turn.end.synchronize()
        return float(self.turn.begin.elapsed_time(self.turn.end)) / 1000


class EncodeExecutor:
    """Batches of sequences through an encoder.

    Args:
        model: what computes.
        info: what the frontend is told; `task`, `function` and `device` count here.
        bounds: of requests and steps.
        max_queue: most requests that wait.
        inputs: the steps' memory; None: made here.
        reducing: asked first, where a step has one kind of options.
        best_shares: the operator by which it reduces.
        lead: to the replica's other ranks, where transformers compute.
        followers: the replica's other ranks, where the fused encoder computes.
        launch_ahead: a step is launched before the one before it is read; None: on a GPU.

    Raises:
        UnsupportedModel: the task is not served.
    """

    def __init__(
        self,
        model: EncoderModel,
        info: EngineInfo,
        bounds: Bounds,
        *,
        max_queue: int,
        inputs: EncoderInputs | None = None,
        reducing: Reducing | None = None,
        best_shares: BestShares = reference.best_shares,
        lead: Lead | None = None,
        followers: EncodeFollowers | None = None,
        launch_ahead: bool | None = None,
    ) -> None:
        check_task(info.task)
        self.info = info
        self.model: EncoderModel | None = model
        self.queue = EncodeQueue(bounds)
        device = torch.device(info.device)
        self.inputs = inputs or EncoderInputs(max(bounds.max_tokens, bounds.max_length), device)
        self._on_gpu = device.type == "cuda"
        self._ahead = self._on_gpu if launch_ahead is None else launch_ahead
        self._max_queue = max_queue
        self.reducing = reducing
        self._best_shares = best_shares
        self._lead = lead
        self._followers = followers
        self._jobs: dict[int, Job] = {}
        self._events: list[Event | EncodedEvent] = []
        self._flight: _Flight | None = None
        self._turns = [_Turn(), _Turn()] if self._on_gpu else []  # of this step, and of the one before it
        self._counts = {"served": 0, "steps": 0, "tokens": 0, "sequences": 0}

    def submit(self, request: SequenceRequest) -> None:
        """Refuse: this executor encodes. Raises InvalidRequest."""
        raise InvalidRequest(f"This deployment serves {self.info.task}.", hint="Use predict.")

    def paint(self, request: PaintRequest) -> None:
        """Refuse, as `submit`. Raises InvalidRequest."""
        raise InvalidRequest(f"This deployment serves {self.info.task}.", hint="Use predict.")

    def encode(self, request: EncodeRequest) -> None:
        """See `Executor`. Raises InvalidRequest, PromptTooLong, QueueFull."""
        info, bounds = self.info, self.queue.bounds
        reduction = parse_reduction(info.task, request.options, function=info.function, vocab_size=bounds.vocab_size)
        job = make_job(request, reduction, bounds)
        waiting = self._waiting()
        if waiting >= self._max_queue:
            raise QueueFull(f"{waiting} requests wait already.", hint="Try again later.")
        self._jobs[request.row_id] = job
        if job.sequences:
            self.queue.jobs.append(job)
        else:
            self._finish(job)

    def cancel(self, row_id: int, reason: FinishReason) -> None:
        """See `Executor`; what is in a step is computed, and then nobody's."""
        job = self._jobs.get(row_id)
        if job is not None:
            tokens = len(job.token_ids)
            self._end(job, FinishedEvent(row_id, reason, 0.0, job.model_s, 0.0, tokens, 0))

    @property
    def busy(self) -> bool:
        """Whether requests wait, or results are to be read or told."""
        return bool(self.queue.jobs or self._flight or self._events)

    def status(self) -> dict[str, Any]:
        """See `Executor`."""
        waiting, steps = self._waiting(), self._counts["steps"]
        mean = self._counts["sequences"] / steps if steps else 0.0
        return {"running": len(self._jobs) - waiting, "waiting": waiting, **self._counts, "mean_batch": mean}

    def close(self) -> None:
        """See `Executor`."""
        self._flight = self.model = self.reducing = None
        for others in (self._lead, self._followers):
            if others is not None:
                others.close()

    def step(self, emit: Emit, poll: Poll) -> None:
        """Launch the next step, then read the one before it (on a CPU: compute and read one step). Raises PeerLost."""
        self._expire()
        step = self.queue.next_step()
        try:
            launched = self._launch(step) if step else None
            before, self._flight = self._flight, launched if self._ahead else None
            for flight in (before, None if self._ahead else launched):
                if flight is not None:
                    self._land(flight)
        except PeerLost:
            self._tell(emit)
            poll()
            raise
        self._tell(emit)

    def _tell(self, emit: Emit) -> None:
        events, self._events = self._events, []
        for event in events:
            emit(event)

    def _expire(self) -> None:
        now = time.monotonic()
        for job in list(self.queue.jobs):
            if job.request.deadline is not None and job.request.deadline <= now and not job.t_first:
                self._fail(job, DeadlineExceeded("The request's time limit passed while it waited."))

    def _launch(self, step: EncodeStep) -> _Flight | None:
        """Start a step; None if it raised, and then its pieces wait again or their requests have failed."""
        now = time.monotonic()
        for piece in step.pieces:
            piece.job.t_first = piece.job.t_first or now
        try:
            return self._compute(step, now)
        except (*STEP_ERRORS, MiinbError, PeerLost) as error:
            if self._on_gpu and is_device_lost(error):
                raise  # nothing on this GPU works any more in this process; the supervisor starts another
            log.exception("a step of %d sequences and %d tokens raised", len(step.lengths), len(step.token_ids))
            self._blame(step, error)
            return None

    @torch.inference_mode()
    def _compute(self, step: EncodeStep, now: float) -> _Flight:
        self.inputs.write(step)
        turn = self._turns[self._counts["steps"] % 2] if self._on_gpu else None
        if turn is not None:
            turn.begin.record()
        with nullcontext(0) if self._followers is None else self._followers.computing(step) as number:
            results = self._results(step, self.inputs.send(), turn)
        if turn is not None:
            turn.end.record()
        self._counts["steps"] += 1
        self._counts["tokens"] += len(step.token_ids)
        self._counts["sequences"] += len(step.lengths)
        return _Flight(step, results, now, turn, number)

    def _results(self, step: EncodeStep, batch: EncoderBatch, turn: _Turn | None) -> list[tuple[list[int], Reduced]]:
        """Numbers of pieces, and their results on the way to the host."""
        assert self.model is not None
        groups = list(step.groups())
        if self.reducing is not None and len(groups) == 1:
            ((numbers, reduction),) = groups
            reduced = self.reducing.reduced(batch, reduction)
            if reduced is not None:
                rows = len(step.lengths if reduction.one_a_sequence else step.rows)
                return [(numbers, self._to_host(reduced, rows, turn))]
        outputs = self.model.outputs(batch)
        results = []
        rows = sequences = 0
        for numbers, reduction in groups:
            first_row, first_sequence = rows, sequences
            rows += sum(step.row_counts[i] for i in numbers)
            sequences += sum(step.pieces[i].count for i in numbers)
            starts = batch.starts[first_sequence : sequences + 1]
            if first_row and reduction.pooling != "none":
                starts = starts - starts[0]
            reduced = reduce(outputs[first_row:rows], reduction, starts, self._best_shares)
            results.append((numbers, self._to_host(reduced, len(reduced.numbers))))
        return results

    def _to_host(self, reduced: Reduced, rows: int, turn: _Turn | None = None) -> Reduced:
        """The first rows of results on the host; of a GPU they are there once the stream has come to this point.

        Args:
            reduced: the results.
            rows: how many count.
            turn: has a place for them, as they are the step's only ones.
        """
        numbers = reduced.numbers[:rows]
        if self._ahead or self._on_gpu:
            place = None if turn is None else turn.place(numbers.shape)
            if place is None:
                # Pinned memory, which PyTorch keeps for the next one: contiguous tensors are copied without a wait.
                place = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=self._on_gpu)
            numbers = place.copy_(numbers, non_blocking=True)
        return Reduced(numbers, reduced.has_ids)

    def _land(self, flight: _Flight) -> None:
        """Read a step's results."""
        seconds = flight.wait()
        step = flight.step
        if self._followers is not None and (failure := self._followers.failure(flight.number)):
            pieces = [piece for piece in step.pieces if piece.job not in flight.void]
            if self._flight is not None:
                self._flight.void.update(piece.job for piece in pieces)
            self._blame(dataclasses.replace(step, pieces=pieces), failure)
            return
        for numbers, reduced in flight.results:
            values, ids = reduced.parts()
            at = 0
            for i in numbers:
                piece = step.pieces[i]
                rows = piece.count if piece.job.reduction.one_a_sequence else step.row_counts[i]
                place = slice(at, at + rows)
                at += rows
                if not piece.job.ended and piece.job not in flight.void:
                    piece.job.model_s += seconds
                    self._take(piece, values[place], None if ids is None else ids[place])

    def _take(self, piece: Piece, values: Any, ids: Any) -> None:
        job = piece.job
        if not math.isfinite(values.sum(dtype=np.float64)):  # which sums of fp32 cannot exceed
            self._fail(job, NonFinite("The model produced NaN or infinity for this request."))
            return
        size = int(job.row_starts[-1]) * values.shape[1] * (4 if ids is None else 8)
        if size > MAX_ANSWER_BYTES:
            text = f"The answer would have {size >> 20} MB, more than {MAX_ANSWER_BYTES >> 20}."
            self._fail(job, InvalidRequest(text, hint="Send fewer texts at once."))
            return
        job.store(piece, values, ids)
        if job.done == job.sequences:
            self._finish(job)

    def _blame(self, step: EncodeStep, error: Exception) -> None:
        """After a step has raised: try again with less, or let the request fail whose fault it is.

        Raises:
            PeerLost: this replica cannot go on; its requests have been told.
        """
        failure, lost = settled(self._lead, error)
        jobs = {piece.job for piece in step.pieces}
        if lost is not None:
            for job in tuple(self._jobs.values()):
                self._fail(job, failure)
            raise lost from error
        if isinstance(failure, OutOfMemory) and len(step.lengths) > 1:
            self._shrink(len(step.token_ids) // 2)
        elif len(jobs) > 1:
            for job in jobs:
                job.alone = True
        else:
            for job in jobs:
                self._fail(job, failure)
        self.queue.put_back(step)

    def _shrink(self, tokens: int) -> None:
        """From now on smaller steps."""
        self.queue.max_tokens = tokens
        if self._on_gpu:
            torch.cuda.empty_cache()
        reason = "a larger step ran out of memory"
        plan = self.info.plan.with_line("steps", f"{tokens} tokens", reason)
        warning = f"Steps are limited to {tokens} tokens: {reason}."
        self.info = dataclasses.replace(self.info, plan=dataclasses.replace(plan, warnings=(*plan.warnings, warning)))

    def _waiting(self) -> int:
        return sum(not job.t_first for job in self.queue.jobs)

    def _finish(self, job: Job) -> None:
        values, ids = job.values, job.ids
        self._counts["served"] += 1
        self._end(
            job,
            EncodedEvent(
                row_id=job.request.row_id,
                columns=0 if values is None else values.shape[1],
                values=b"" if values is None else values.tobytes(),
                ids=b"" if ids is None else ids.tobytes(),
                queue_s=max(0.0, (job.t_first or time.monotonic()) - job.request.t_submit),
                model_s=job.model_s,
            ),
        )

    def _fail(self, job: Job, error: MiinbError) -> None:
        self._end(job, FailedEvent(job.request.row_id, type(error).__name__, error.message, error.hint))

    def _end(self, job: Job, event: Event | EncodedEvent) -> None:
        if not job.ended:
            job.ended = True
            self.queue.remove(job)
            del self._jobs[job.request.row_id]
            self._events.append(event)
