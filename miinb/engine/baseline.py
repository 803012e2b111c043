"""The baseline: plain transformers as a careful user runs it, behind the same interface as the optimized engine.

Right dtype, the attention that transformers chooses (sdpa where it can), eval, inference_mode, left padding with an
attention mask; rows with equal parameters go through `model.generate` together, up to `max_batch`. Nothing of the
optimized engine is used here: this is the truth that it is compared with.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from miinb.config import DeploymentConfig
from miinb.engine import offload
from miinb.engine.autotp import split
from miinb.engine.beam_search import search
from miinb.engine.caches import DYNAMIC, measure_caches, mixes, pads
from miinb.engine.compute import STEP_ERRORS
from miinb.engine.executor import Emit, Executor, Poll
from miinb.engine.finite import check_finite
from miinb.engine.generation import BaselineRow, generate
from miinb.engine.lockstep import BatchFollower, Lead, settled
from miinb.engine.parallel import PeerLost
from miinb.engine.ranks import ALONE, Ranks
from miinb.engine.rows import check_request
from miinb.engine.transformers_encoder import load_encoding
from miinb.engine.transformers_model import load_model
from miinb.engine.weights import DTYPES
from miinb.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MiinbError,
    QueueFull,
    UnsupportedModel,
)
from miinb.image_messages import PaintRequest
from miinb.messages import (
    EncodeRequest,
    EngineInfo,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    Phase,
    Plan,
    SequenceRequest,
    TokenLogprob,
    TokensEvent,
)
from miinb.models import ModelInfo
from miinb.tasks import TASKS
from miinb.wording import size_words

log = logging.getLogger(__name__)


def load_baseline(
    model: ModelInfo,
    config: DeploymentConfig,
    info: EngineInfo,
    report: Callable[[Phase], None],
    ranks: Ranks = ALONE,
) -> Executor | BatchFollower:
    """The executor of plain transformers for a model's task; above rank 0 what follows it.

    Args:
        model: the model's files.
        config: `options.compile` measures the KV caches of transformers and takes the fastest.
        info: what the frontend is told; its plan gets a line about how transformers is run.
        report: told of each phase.
        ranks: the others of this replica.

    Raises:
        MissingHead: the checkpoint lacks weights that the task needs.
        UnsupportedModel: the task is not served, or the model cannot be split.
        PeerLost: another rank ended.
    """
    report(Phase("load", 0, 1, f"{model.family} with transformers"))
    loaded = load_model(model, config, info)
    report(Phase("load", 1, 1))
    offloaded = config.options.offload != "off"
    if config.options.parity != "off" and config.load_format != "dummy" and not offloaded:
        report(Phase("verify"))
        check_finite(loaded.parameters(), model, DTYPES[info.dtype])
    attention = getattr(loaded.config, "_attn_implementation", None) or "eager"
    plan = info.plan.with_line("transformers", "eager", f"attention {attention}")
    if config.tensor_parallel > 1:
        loaded, plan = _split(loaded, config, ranks, plan)
    plan = dataclasses.replace(plan, weights_bytes=sum(parameter.nbytes for parameter in loaded.parameters()))
    if offloaded:
        where = "the host's memory" if config.options.offload == "cpu" else config.options.offload_folder
        why = f"in {where}: ZeRO-Inference fetches a layer at a time"
        plan = plan.with_line("offload", size_words(offload.bytes_of(loaded)), why)
    info = dataclasses.replace(info, plan=plan)
    lead = Lead(ranks.leader, config.tensor_parallel - 1) if ranks.leader is not None else None
    if not TASKS[info.task].streams:
        if ranks.link is not None:
            return BatchFollower(info, loaded, ranks.link)
        return load_encoding(loaded, config, info, lead, report)
    mixed = mixes(loaded)
    padded = not mixed and (config.options.parity == "off" or pads(loaded, info.vocab_size))
    if not padded:
        why = "turns by the longest prompt" if mixed else "takes padding for a part of the prompt"
        plan = plan.with_line("batches", "equal lengths", f"{model.family} {why}")
    if info.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new length: up to 0.1 s a token
    cache, batch_cache, plan = _choose_cache(loaded, config, info, plan, report)
    info, queue = dataclasses.replace(info, plan=plan), config.options.max_queue
    if ranks.link is not None:
        return BatchFollower(info, loaded, ranks.link)
    return BatchExecutor(loaded, info, max_queue=queue, cache=cache, batch_cache=batch_cache, padded=padded, lead=lead)


def _choose_cache(
    model: Any, config: DeploymentConfig, info: EngineInfo, plan: Plan, report: Callable[[Phase], None]
) -> tuple[str, str, Plan]:
    """The cache for a row alone, that for several, and the plan with a line on them; all ranks make the same calls."""
    # In place of the optimized engine transformers gets its fastest cache on a GPU; on a CPU compiling takes too long.
    stands_in = config.engine == "optimized"
    if config.options.offload != "off":
        return DYNAMIC, DYNAMIC, plan
    if stands_in and info.device != "cuda":
        why = "static ones and torch.compile are tried on GPUs, or with engine='baseline' and options.compile"
        return DYNAMIC, DYNAMIC, plan.with_line("cache", DYNAMIC, why)
    if not (config.options.compile or stands_in):
        return DYNAMIC, DYNAMIC, plan
    report(Phase("capture", text="comparing transformers' caches"))
    times = measure_caches(model, info.vocab_size, info.max_length)
    cache = min(times, key=lambda name: times[name].seconds)
    told = ", ".join(f"{name} {time.text}" for name, time in times.items())
    # Compiled again for every number of rows, a served batch would wait for minutes.
    batch_cache = DYNAMIC if stands_in else cache
    more = f"; {batch_cache} for several rows" if batch_cache != cache else ""
    return cache, batch_cache, plan.with_line("cache", cache, f"the fastest of {told} a token at batch 1{more}")


def _split(model: Any, config: DeploymentConfig, ranks: Ranks, plan: Plan) -> tuple[Any, Plan]:
    """This rank's part of the model, and the plan with what was done. Raises UnsupportedModel, PeerLost."""
    ranks.meet()  # before the first collective, whose time is limited
    count, verify = config.tensor_parallel, config.options.parity != "off"
    try:
        model, difference = split(model, count, device=plan.device, verify=verify)
    except UnsupportedModel:
        ranks.check()
        raise
    how = f"outputs within {difference:.1e} of the whole model's" if verify else "not compared with the whole model"
    return model, ranks.describe(plan.with_line("tensor_parallel", f"{count} ranks, DeepSpeed AutoTP", how))


class BatchExecutor:
    """Batches of rows through `model.generate`; tokens come out, and cancels are heard, between its steps.

    Args:
        model: a transformers model for text generation.
        info: what the frontend is told; `max_batch`, `max_length` and `eos_token_ids` count here.
        max_queue: most rows that wait.
        cache: which of `generation.CACHES` for a row alone.
        batch_cache: the same for batches of several; None: `cache`.
        padded: rows of different lengths may share a batch.
        lead: to the replica's other ranks, which compute the same batches.
    """

    def __init__(
        self,
        model: Any,
        info: EngineInfo,
        *,
        max_queue: int,
        cache: str = DYNAMIC,
        batch_cache: str | None = None,
        padded: bool = True,
        lead: Lead | None = None,
    ) -> None:
        self.info = info
        self.model = model
        self.cache = cache
        self.batch_cache = batch_cache or cache
        self._max_queue = max_queue
        self._padded = padded
        self._lead = lead
        self._waiting: deque[BaselineRow] = deque()
        self._running: list[BaselineRow] = []
        self._rows: dict[int, BaselineRow] = {}
        self._events: list[Event] = []
        self._batches = 0

    def submit(self, request: SequenceRequest) -> None:
        """See `Executor`. Raises InvalidRequest, PromptTooLong, QueueFull."""
        check_request(request, self.info.max_length, self.info.vocab_size)
        if len(self._waiting) >= self._max_queue:
            raise QueueFull(f"{len(self._waiting)} rows wait already.", hint="Try again later.")
        params = request.params
        eos = params.eos_token_id if params.eos_token_id is not None else self.info.eos_token_ids
        row = BaselineRow(request, frozenset() if params.ignore_eos else frozenset(eos))
        self._rows[request.row_id] = row
        self._waiting.append(row)

    def encode(self, request: EncodeRequest) -> None:
        """Refuse: this executor generates. Raises InvalidRequest."""
        raise InvalidRequest(f"This deployment serves {self.info.task}.", hint="Use generate or stream.")

    def paint(self, request: PaintRequest) -> None:
        """Refuse, as `encode`. Raises InvalidRequest."""
        raise InvalidRequest(f"This deployment serves {self.info.task}.", hint="Use generate or stream.")

    def cancel(self, row_id: int, reason: FinishReason) -> None:
        """See `Executor`; a running row's place in the batch is computed on until the batch ends."""
        row = self._rows.get(row_id)
        if row is not None:
            if not row.t_start:
                self._waiting.remove(row)
            self.finish(row, reason)

    @property
    def busy(self) -> bool:
        """Whether rows wait."""
        return bool(self._rows or self._events)

    def status(self) -> dict[str, Any]:
        """See `Executor`."""
        running = sum(not row.ended for row in self._running)
        return {"running": running, "waiting": len(self._waiting), "batches": self._batches}

    def close(self) -> None:
        """See `Executor`."""
        self.model = None
        if self._lead is not None:
            self._lead.close()

    def step(self, emit: Emit, poll: Poll) -> None:
        """Generate one batch from the longest-waiting row and those like it. Raises PeerLost."""
        self._expire()
        self._running = self._next_batch()

        def between() -> None:
            self._flush(emit)
            poll()
            self._flush(emit)

        if self._running:
            self._batches += 1
            cache = self.cache if len(self._running) == 1 else self.batch_cache
            failure = self._compute(cache, between)
            if failure is not None and cache != DYNAMIC:
                self._leave_cache(cache, failure)
                failure = self._compute(DYNAMIC, between)
            if failure is not None:
                for row in self._running:
                    self.fail(row, failure)
        self._running = []
        self._flush(emit)

    def _compute(self, cache: str, between: Poll) -> MiinbError | None:
        """Run the batch to its end; what its rows are to be told if it raised. Raises PeerLost, its rows told."""
        try:
            if self._running[0].params.num_beams > 1:
                search(self.model, self._running, self, between, self._lead)
            else:
                generate(self.model, self._running, self, between, cache, self._lead)
        except (*STEP_ERRORS, MiinbError, PeerLost) as error:
            log.exception("a batch of %d rows raised with the %s", len(self._running), cache)
            failure, lost = settled(self._lead, error)
            if lost is None:
                return failure
            for row in self._running:
                self.fail(row, failure)
            between()
            raise lost from error
        return None

    def _leave_cache(self, cache: str, failure: MiinbError) -> None:
        """From now on the dynamic cache; the running rows' tokens so far hold."""
        self.cache = self.batch_cache = DYNAMIC
        text = f"The {cache} failed on a batch and is used no more: {failure.message}"
        plan = self.info.plan.with_line("cache", DYNAMIC, f"the {cache} failed on a batch")
        self.info = dataclasses.replace(self.info, plan=dataclasses.replace(plan, warnings=(*plan.warnings, text)))
        for row in self._running:
            row.replay = list(row.output)

    def _flush(self, emit: Emit) -> None:
        events, self._events = self._events, []
        for event in events:
            emit(event)

    def _expire(self) -> None:
        now = time.monotonic()
        for row in [row for row in self._waiting if row.request.deadline is not None and row.request.deadline <= now]:
            self._waiting.remove(row)
            self.fail(row, DeadlineExceeded("The request's time limit passed while it waited."))

    def _next_batch(self) -> list[BaselineRow]:
        if not self._waiting:
            return []
        key = self._waiting[0].key(padded=self._padded)
        batch = [row for row in self._waiting if row.key(padded=self._padded) == key][: self.info.max_batch]
        now = time.monotonic()
        for row in batch:
            self._waiting.remove(row)
            row.t_start = now
        return batch

    def take(self, row: BaselineRow, token_id: int, logprobs: tuple[TokenLogprob, ...]) -> None:
        """A row's next token."""
        row.output.append(token_id)
        row.t_first = row.t_first or time.monotonic()
        self._events.append(TokensEvent(row.request.row_id, (token_id,), logprobs))
        if token_id in row.eos:
            self.finish(row, "stop")
        elif len(row.output) == row.params.max_new_tokens:
            self.finish(row, "length")

    def finish(self, row: BaselineRow, reason: FinishReason) -> None:
        """End a row."""
        now = time.monotonic()
        start = row.t_start or now
        self._events.append(
            FinishedEvent(
                row_id=row.request.row_id,
                finish_reason=reason,
                queue_s=max(0.0, start - row.request.t_submit),
                model_s=now - start,
                prefill_s=(row.t_first or now) - start,
                prompt_tokens=len(row.request.token_ids),
                output_tokens=len(row.output),
            )
        )
        self._end(row)

    def fail(self, row: BaselineRow, error: MiinbError) -> None:
        """End a row with an error of its own."""
        if not row.ended:
            self._events.append(FailedEvent(row.request.row_id, type(error).__name__, error.message, error.hint))
            self._end(row)

    def _end(self, row: BaselineRow) -> None:
        row.ended = True
        del self._rows[row.request.row_id]
