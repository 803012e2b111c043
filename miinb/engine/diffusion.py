"""The image executor: one batch of pictures at a time, progress between the steps of its denoising.

Cancels come in between steps, and on a CPU, where a step may take minutes, within them and within all else that the
models compute (`polling.py`). A batch that nobody wants any more ends there.

What computes is a `Painter`: `pipeline_painter.PipelinePainter` is diffusers as published, the truth that others are
compared with. A picture's noise comes from its own seed alone, drawn on the CPU, so that batches, devices and engines
agree on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from miinb.engine.compute import STEP_ERRORS, is_device_lost, is_out_of_memory, request_error
from miinb.engine.executor import Emit, Poll
from miinb.engine.paint_queue import PaintQueue, Row
from miinb.engine.painting import Decoded, Painter, Work, start_of, work_of
from miinb.engine.polling import polled
from miinb.engine.previews import preview_of
from miinb.errors import DeadlineExceeded, InvalidRequest, MiinbError, NonFinite, OutOfMemory, QueueFull, did_you_mean
from miinb.image_messages import PaintedEvent, PaintProgress, PaintRequest, PaintSource
from miinb.image_params import ImageParams
from miinb.messages import EncodeRequest, EngineInfo, FailedEvent, FinishedEvent, FinishReason, SequenceRequest

log = logging.getLogger(__name__)

#: Progress of a batch is told at most so often.
PROGRESS_S = 0.2
#: Pixels of one batch: the outbox of the rank's socket takes two such batches.
MAX_BATCH_BYTES = 32 << 20
#: Of pictures that a GPU decodes together: eight of 512 x 512, whose largest layer is 1 GB in fp16.
MAX_DECODED_PIXELS = 8 * 512 * 512
#: Of pictures to begin from that wait: some 240 of 512 x 512.
MAX_WAITING_BYTES = 256 << 20


class _Abandoned(Exception):
    """Nobody wants the batch any more."""


class ImageExecutor:
    """Batches of pictures; see `Executor`.

    Args:
        painter: computes them.
        info: what the frontend is told, to which the painter's schedulers are added; `max_batch` counts here.
        max_queue: most pictures that wait.
    """

    def __init__(self, painter: Painter, info: EngineInfo, *, max_queue: int) -> None:
        plan = dataclasses.replace(info.plan, schedulers=tuple(painter.schedulers))
        self.info = dataclasses.replace(info, plan=plan)
        self.painter = painter
        self._max_queue = max_queue
        self._waiting = PaintQueue()
        self._running: list[Row] = []
        self._rows: dict[int, Row] = {}
        self._ends: list[FinishedEvent | FailedEvent] = []
        self._batches = 0
        self._coming = False  # more pictures of the last one's request
        self._told_at = -math.inf

    def submit(self, request: SequenceRequest) -> None:
        """Refuse: this executor makes pictures. Raises InvalidRequest."""
        raise InvalidRequest(f"This deployment serves {self.info.task}.", hint="Use generate with its parameters.")

    def encode(self, request: EncodeRequest) -> None:
        """Refuse, as `submit`. Raises InvalidRequest."""
        raise InvalidRequest(f"This deployment serves {self.info.task}.", hint="Use generate.")

    def paint(self, request: PaintRequest) -> None:
        """Queue a picture. Raises InvalidRequest, QueueFull."""
        params, painter, self._coming = request.params, self.painter, request.more
        scheduler = params.scheduler or painter.scheduler
        if scheduler not in painter.schedulers:
            hint = _lacking(scheduler) or did_you_mean(scheduler, painter.schedulers)
            hint = hint or f"There are: {', '.join(painter.schedulers)}."
            raise InvalidRequest(f"scheduler: {scheduler!r} is none for this model.", hint=hint)
        if len(self._waiting) >= self._max_queue:
            raise QueueFull(f"{len(self._waiting)} pictures wait already.", hint="Try again later.")
        self._check_sources(request)
        work = work_of(request, painter, scheduler)
        painter.check(work)
        row = Row(request, work)
        self._rows[request.row_id] = row
        self._waiting.add(row)

    def _check_sources(self, request: PaintRequest) -> None:
        """Pictures to begin from wait in memory; the rows of one request share theirs."""
        sources = {id(one.source): one.source for one in (request, *(row.request for row in self._waiting))}
        held = sum(len(one.image) + len(one.mask) for one in sources.values() if one is not None)
        if request.source is not None and held > MAX_WAITING_BYTES:
            raise QueueFull(f"Pictures to begin from of {held >> 20} MiB wait already.", hint="Try again later.")

    def cancel(self, row_id: int, reason: FinishReason) -> None:
        """See `Executor`; a running picture is computed on while others of its batch are wanted."""
        row, self._coming = self._rows.get(row_id), False
        if row is None:
            return
        if not row.t_start:
            self._waiting.remove(row)
        self._ends.append(FinishedEvent(row_id, reason, 0.0, 0.0, 0.0, 0, 0))
        self._end(row)

    @property
    def busy(self) -> bool:
        """Whether pictures wait."""
        return bool(self._rows or self._ends)

    def status(self) -> dict[str, Any]:
        """See `Executor`."""
        running = sum(not row.ended for row in self._running)
        return {"running": running, "waiting": len(self._waiting), "batches": self._batches}

    def close(self) -> None:
        """See `Executor`."""
        self.painter.close()

    def step(self, emit: Emit, poll: Poll) -> None:
        """Compute one batch: `PaintQueue` says of which pictures."""
        while self._coming:
            poll()
        self._expire()
        self._running = batch = self._waiting.take(self._most)

        def between() -> None:
            self._flush(emit)
            poll()
            self._flush(emit)
            if all(row.ended for row in batch):
                raise _Abandoned

        if batch:
            self._batches += 1
            try:
                with contextlib.nullcontext() if self.info.device == "cuda" else polled(between):
                    self._paint(batch, emit, between)
            except _Abandoned:
                log.info("a batch of %d pictures was given up", len(batch))
            except (*STEP_ERRORS, MiinbError) as error:
                log.exception("a batch of %d pictures raised", len(batch))
                if is_device_lost(error):
                    raise
                self._failed(batch, error)
        self._running = []
        self._flush(emit)

    def _paint(self, batch: list[Row], emit: Emit, between: Poll) -> None:
        work, painter = batch[0].work, self.painter
        begin = time.monotonic()
        self._begun(batch, emit)
        conditions = self._embedded(batch)
        between()
        while self._coming:
            between()
        if late := self._waiting.take(self._most, batch):  # lists come one by one; to read texts takes next to no time
            batch += late
            self._begun(late, emit)
            conditions = self._embedded(batch)
        embedded = time.monotonic()

        def after_step(step: int, latents: Tensor) -> None:
            self._tell(batch, step, latents, emit)
            between()

        latents = painter.denoise(conditions, work, [start_of(row.request) for row in batch], after_step)
        self._wait()
        computed = time.monotonic()
        times = {"text_encode_s": embedded - begin, "steps_s": computed - embedded}
        left, most = list(zip(batch, latents, strict=True)), self._decoded_together(work)
        while left := [(row, own) for row, own in left if not row.ended]:
            count = min(1 << (len(left).bit_length() - 1), most)  # few sizes, as cuDNN tries its ways for each
            some = torch.stack([own for _, own in left[:count]])
            for (row, _), decoded in zip(left[:count], self._decoded(some), strict=True):
                spent = {"queue_s": max(0.0, row.t_start - row.request.t_submit), "vae_s": time.monotonic() - computed}
                if not row.ended:  # canceled meanwhile
                    self._finish(row, decoded, len(batch), {**times, **spent}, emit)
            if len(left) > count:
                between()

    def _decoded_together(self, work: Work) -> int:
        """Most pictures that are decoded at a time: on a CPU each as soon as it can be."""
        return max(1, MAX_DECODED_PIXELS // (work.width * work.height)) if self.info.device == "cuda" else 1

    def _decoded(self, latents: Tensor) -> list[Decoded]:
        """The pictures of latents, one by one where the device has no memory for all."""
        try:
            return self.painter.decode(latents)
        except STEP_ERRORS as error:
            if len(latents) == 1 or not is_out_of_memory(error):
                raise
        return [decoded for one in latents for decoded in self.painter.decode(one[None])]

    def _embedded(self, batch: Sequence[Row]) -> Any:
        """The conditions of a batch, computed."""
        prompts = [row.request.prompt for row in batch]
        negatives = [row.request.params.negative_prompt or "" for row in batch]
        conditions = self.painter.embed(prompts, negatives, batch[0].work.guidance)
        self._wait()
        return conditions

    def _wait(self) -> None:
        """Until the device has computed: times would else be those of launches."""
        if self.info.device == "cuda":
            torch.cuda.synchronize()

    def _finish(self, row: Row, decoded: Decoded, batch: int, times: dict[str, float], emit: Emit) -> None:
        if isinstance(decoded, NonFinite):
            self._fail(row, decoded)
            return
        (pixels, flagged), request, work = decoded, row.request, row.work
        prompt, negative = (self.painter.read(text or "") for text in (request.prompt, request.params.negative_prompt))
        facts = {"prompt_tokens": prompt.tokens, "cut": prompt.cut, "negative_cut": negative.cut, "batch": batch}
        seed = request.params.seed or 0
        size = (work.width, work.height)
        schedule = self.painter.noise_schedule(work.scheduler)
        emit(PaintedEvent(request.row_id, *size, seed, flagged, work.scheduler, facts, times, pixels, schedule))
        self._end(row)

    def _begun(self, rows: Sequence[Row], emit: Emit) -> None:
        """Pictures are computed from now on, though their first step may take minutes."""
        for row in rows:
            emit(PaintProgress(row.request.row_id, 0, row.work.done))

    def _tell(self, batch: Sequence[Row], step: int, latents: Tensor, emit: Emit) -> None:
        """Progress of every picture, with a preview of those for which one is due."""
        now, total = time.monotonic(), batch[0].work.done
        if now - self._told_at < PROGRESS_S and step < total:
            return
        self._told_at = now
        for place, row in enumerate(batch):
            if row.ended:
                continue
            every = row.request.params.preview_steps
            due = step // every if every else 0
            width, preview = preview_of(latents[place], self.painter.colors) if due > row.shown else (0, b"")
            row.shown = due
            emit(PaintProgress(row.request.row_id, step, total, width, preview))

    def _failed(self, batch: Sequence[Row], error: Exception) -> None:
        """One picture by itself tells whose fault it was."""
        left = [row for row in batch if not row.ended]
        if len(batch) > 1:
            self._waiting.put_back(left)
            return
        for row in left:
            self._fail(row, told(error))

    def _flush(self, emit: Emit) -> None:
        ends, self._ends = self._ends, []
        for event in ends:
            emit(event)

    def _expire(self) -> None:
        now = time.monotonic()
        for row in [row for row in self._waiting if row.request.deadline is not None and row.request.deadline <= now]:
            self._waiting.remove(row)
            self._fail(row, DeadlineExceeded("The request's time limit passed while it waited."))

    def _most(self, work: Work) -> int:
        """Pictures of a batch."""
        return min(self.info.max_batch, max(1, MAX_BATCH_BYTES // (3 * work.width * work.height)))

    def _fail(self, row: Row, error: MiinbError) -> None:
        self._ends.append(FailedEvent(row.request.row_id, type(error).__name__, error.message, error.hint))
        self._end(row)

    def _end(self, row: Row) -> None:
        row.ended = True
        del self._rows[row.request.row_id]


def told(error: Exception) -> MiinbError:
    """What the user of a picture that failed is told."""
    if is_out_of_memory(error):
        return OutOfMemory("The device ran out of memory in this picture's steps.", hint="Ask for a smaller one.")
    return request_error(error)


def _lacking(scheduler: str) -> str:
    """What diffusers needs for a scheduler and is not installed, in words; "" where that is not why it is missing."""
    import diffusers

    needed = getattr(getattr(diffusers, scheduler, None), "_backends", ())
    missing = [name for name in needed if find_spec(name) is None]
    return f"It needs {' and '.join(missing)}: install it, and start the deployment again." if missing else ""


def warm_up_request(executor: ImageExecutor, now: float) -> PaintRequest:
    """Two steps: of the usual size on a GPU, whose libraries choose by size, of a small one on a CPU."""
    painter = executor.painter
    width, height = (painter.width, painter.height) if executor.info.device == "cuda" else (64, 64)
    params = ImageParams(num_inference_steps=2, seed=0, width=width, height=height)
    if "text" in painter.kinds:
        return PaintRequest(-1, "", params, now)
    pixels = width * height
    return PaintRequest(-1, "", params, now, source=PaintSource(bytes(3 * pixels), bytes([255]) * pixels))
