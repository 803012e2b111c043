"""Continuous batching: which rows compute how many tokens in the next step. Pure Python, no torch.

Rows are served in order of arrival. Each step gives one token to every decoding row and fills what is left of
`max_step_tokens` with prompts, in chunks (Sarathi-Serve, arXiv:2403.02310). Memory is counted in pages (PagedAttention,
arXiv:2309.06180). When pages run out the youngest row gives its pages back and is computed again later: nothing is
lost, and because no younger row ever goes first, the oldest row always makes progress and none starves.

`schedule` may run ahead of `complete` by a step: the tokens of step n are then still on the GPU while step n+1 is
planned. So a row's end (EOS) acts one step late, and the pages of a row are given back only when no step in flight can
write them.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from miinb.engine.pages import ROOT, PagePool
from miinb.engine.rows import Row, RowState, StepPlan, check_request
from miinb.errors import DeadlineExceeded, MiinbError, NonFinite, QueueFull
from miinb.messages import Event, FailedEvent, FinishedEvent, FinishReason, SequenceRequest, TokenLogprob, TokensEvent


class Scheduler:
    """Admits, plans, preempts and ends rows.

    Args:
        pages: pages of the KV cache.
        page_tokens: tokens in a page.
        max_batch: most rows at once (also the number of slots); at most `max_step_tokens` of them are used.
        max_length: longest prompt and answer together.
        vocab_size: tokens in the vocabulary.
        max_step_tokens: most tokens in a step.
        max_queue: most rows that wait.
        eos_token_ids: tokens that end a row unless its parameters say otherwise.
        prefix_cache: reuse the pages of equal prefixes.
    """

    def __init__(
        self,
        *,
        pages: int,
        page_tokens: int,
        max_batch: int,
        max_length: int,
        vocab_size: int,
        max_step_tokens: int = 2048,
        max_queue: int = 1024,
        eos_token_ids: Collection[int] = (),
        prefix_cache: bool = True,
    ) -> None:
        self.pool = PagePool(pages, page_tokens, prefix_cache=prefix_cache)
        self.max_batch = min(max_batch, max_step_tokens)
        self.max_length = min(max_length, pages * page_tokens)
        self.vocab_size = vocab_size
        self.max_step_tokens = max_step_tokens
        self.max_queue = max_queue
        self.preemptions = 0
        self._eos = frozenset(eos_token_ids)
        self._rows: dict[int, Row] = {}  # not ended
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []  # in order of arrival
        self._leaving: set[Row] = set()  # hold pages until the step in flight is complete
        self._slots = list(range(self.max_batch - 1, -1, -1))
        self._deadlines: list[tuple[float, int, Row]] = []
        self._events: list[Event] = []
        self._blank: list[int] = []
        self._arrivals = 0

    # ------------------------------------------------------------------ rows come and go

    def submit(self, request: SequenceRequest) -> None:
        """Queue a row.

        Raises:
            InvalidRequest, PromptTooLong: it can never be computed.
            QueueFull: `max_queue` rows wait.
        """
        check_request(request, self.max_length, self.vocab_size)
        if len(self._waiting) >= self.max_queue + len(self._slots):  # what arrives between two steps waits for slots
            raise QueueFull(f"{len(self._waiting)} rows wait already.", hint="Try again later.")
        params = request.params
        eos = frozenset(params.eos_token_id) if params.eos_token_id is not None else self._eos
        row = Row(request, self._arrivals, frozenset() if params.ignore_eos else eos)
        self._arrivals += 1
        self._rows[row.row_id] = row
        self._waiting.append(row)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, row.order, row))

    def cancel(self, row_id: int, reason: FinishReason, now: float) -> None:
        """End a row before the next step; a row that has ended is left alone."""
        row = self._rows.get(row_id)
        if row is not None:
            self._finish(row, reason, now)

    def fail(self, row: Row, error: MiinbError) -> None:
        """End a row with an error of its own."""
        if row.state is not RowState.ENDED:
            self._events.append(FailedEvent(row.row_id, type(error).__name__, error.message, error.hint))
            self._end(row)

    def take_events(self) -> list[Event]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def take_blank(self) -> list[int]:
        """Freed pages that may hold NaN: they are to be zeroed before the next step (masked NaN is still NaN)."""
        pages, self._blank = self._blank, []
        return pages

    @property
    def running(self) -> int:
        """Rows that are being computed."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Rows that wait for memory or a slot."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a row has not ended, or an event waits to be taken."""
        return bool(self._rows or self._events)

    def check(self) -> None:
        """Compare the books of pages and slots with the rows (for tests). Raises RuntimeError."""
        holders = [*self._running, *self._leaving]
        self.pool.check([row.pages for row in holders])
        slots = sorted([*self._slots, *(row.slot for row in holders)])
        if slots != list(range(self.max_batch)):
            raise RuntimeError(f"slots are lost or used twice: {slots}")

    # ------------------------------------------------------------------ a step

    def schedule(self, now: float) -> StepPlan | None:
        """Plan the next step; None if nothing can be computed before a step in flight is complete, or at all."""
        self._expire(now)
        plan = StepPlan()
        chunks = StepPlan()
        ready = [row for row in self._running if row.length < row.limit]
        budget = self.max_step_tokens - len(ready)  # for prompts, after one token for each row
        short = False
        for row in ready:
            if row.state is not RowState.RUNNING:
                continue  # preempted for an older row of this step
            count = min(row.length - row.computed, 1 + budget)
            if row.computed + count > len(row.pages) * self.pool.page_tokens and not self._reserve(row, count):
                short = True
                continue
            budget -= count - 1
            self._add(plan if count == 1 else chunks, row, count)
        if not short:
            self._admit(plan, chunks, budget, now)
        for name in ("rows", "starts", "counts", "samples"):
            getattr(plan, name).extend(getattr(chunks, name))
        return plan if plan.rows else None

    def complete(
        self,
        plan: StepPlan,
        token_ids: Sequence[int],
        finite: Sequence[bool],
        now: float,
        logprobs: Mapping[int, TokenLogprob] | None = None,
    ) -> None:
        """Take a step's results, in the order of the plans.

        Args:
            plan: the step.
            token_ids: the new token of each row of the plan (ignored where the row does not sample).
            finite: whether the row's logits were finite.
            now: the time.
            logprobs: by place in the plan.
        """
        for i, row in enumerate(plan.rows):
            row.in_flight -= 1
            if row.state is not RowState.ENDED and plan.samples[i]:
                if finite[i]:
                    self._register(row, plan.starts[i] + plan.counts[i])
                    self._take(row, token_ids[i], now, (logprobs[i],) if logprobs and i in logprobs else ())
                else:
                    row.poisoned = True
                    self.fail(row, NonFinite("The model produced NaN or infinity for this request."))
            if row in self._leaving:
                self._release(row)

    def abandon(self, plan: StepPlan, failed: Collection[Row], error: MiinbError) -> None:
        """Undo a step that raised: these rows fail with the error, the others are as before it."""
        for i, row in enumerate(plan.rows):
            row.in_flight -= 1
            if row in failed:
                row.poisoned = True
                self.fail(row, error)
            elif row.state is not RowState.ENDED:
                row.length -= plan.samples[i]
                if row.state is RowState.RUNNING:
                    row.computed -= plan.counts[i]
            if row in self._leaving:
                self._release(row)

    # ------------------------------------------------------------------ inside

    def _add(self, plan: StepPlan, row: Row, count: int) -> None:
        samples = row.computed + count == row.length
        plan.rows.append(row)
        plan.starts.append(row.computed)
        plan.counts.append(count)
        plan.samples.append(samples)
        row.computed += count
        row.length += samples
        row.in_flight += 1

    def _reserve(self, row: Row, count: int) -> bool:
        """Pages for so many more tokens, taken from younger rows if need be. False: not in this step."""
        need = self.pool.pages_for(row.computed + count) - len(row.pages)
        while need > self.pool.free:
            if self._leaving:
                return False  # pages come back when the step in flight is complete
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is row:
                return False
        for _ in range(need):
            row.pages.append(self.pool.allocate())
        return True

    def _admit(self, plan: StepPlan, chunks: StepPlan, budget: int, now: float) -> None:
        while self._waiting and self._slots and budget > 0:
            row = self._waiting[0]
            if row.slot >= 0:
                return  # preempted with a step in flight: its pages and its last token come with that step
            # The last token is always computed: its logits are wanted.
            reused, entry = self.pool.match(row.token_ids, row.length - 1)
            need = self.pool.pages_for(row.length) - len(reused)
            # Every running row shall be able to grow by a page, or this one is soon thrown out again.
            if self._running and need + self.pool.idle(reused) + len(self._running) > self.pool.free:
                return
            if need + self.pool.idle(reused) > self.pool.free:
                return
            self._waiting.popleft()
            self.pool.hold(reused)
            row.pages = reused + [self.pool.allocate() for _ in range(need)]
            row.entry, row.registered = entry, len(reused)
            row.computed = len(reused) * self.pool.page_tokens
            row.slot = self._slots.pop()
            row.state = RowState.RUNNING
            if not row.t_start:
                row.t_start = now
                row.cached_tokens = row.computed
            insort(self._running, row)
            plan.admitted.append(row)
            count = min(row.length - row.computed, budget)
            budget -= count
            self._add(plan if count == 1 else chunks, row, count)

    def _preempt(self, row: Row) -> None:
        self.preemptions += 1
        self._running.remove(row)
        row.state = RowState.WAITING
        row.computed = 0
        self._waiting.appendleft(row)
        self._leave(row)

    def _take(self, row: Row, token_id: int, now: float, logprobs: tuple[TokenLogprob, ...]) -> None:
        """A row's next token."""
        row.token_ids.append(token_id)
        row.t_first = row.t_first or now
        self._events.append(TokensEvent(row.row_id, (token_id,), logprobs))
        if token_id in row.eos:
            self._finish(row, "stop", now)
        elif len(row.token_ids) == row.limit:
            self._finish(row, "length", now)

    def _register(self, row: Row, written: int) -> None:
        """Tell the prefix cache of the row's pages that are full, written and proven finite."""
        size = self.pool.page_tokens
        if not self.pool.prefix_cache or written < (row.registered + 1) * size:
            return
        for i in range(row.registered, written // size):
            row.entry = self.pool.register(row.entry, row.token_ids[i * size : (i + 1) * size], row.pages[i])
            row.registered = i + 1

    def _finish(self, row: Row, reason: FinishReason, now: float) -> None:
        start = row.t_start or now
        self._events.append(
            FinishedEvent(
                row_id=row.row_id,
                finish_reason=reason,
                queue_s=max(0.0, start - row.request.t_submit),
                model_s=now - start,
                prefill_s=(row.t_first or now) - start,
                prompt_tokens=row.prompt_tokens,
                output_tokens=len(row.token_ids) - row.prompt_tokens,
                cached_tokens=row.cached_tokens,
            )
        )
        self._end(row)

    def _end(self, row: Row) -> None:
        del self._rows[row.row_id]
        if row.state is RowState.RUNNING:
            self._running.remove(row)
            row.state = RowState.ENDED
            self._leave(row)
        else:
            self._waiting.remove(row)
            row.state = RowState.ENDED

    def _leave(self, row: Row) -> None:
        """The row needs its memory no more."""
        self._leaving.add(row)
        self._release(row)

    def _release(self, row: Row) -> None:
        if row.in_flight:
            return
        self._leaving.discard(row)
        # Last page first: of a chain the end is forgotten before the start, which alone is of no use without it.
        blank = [page for page in reversed(row.pages) if self.pool.release(page)]
        if row.poisoned:
            self._blank += blank
        self._slots.append(row.slot)
        row.pages, row.slot, row.registered, row.entry = [], -1, 0, ROOT

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            row = heapq.heappop(self._deadlines)[2]
            if row.state is RowState.WAITING and not row.t_start:
                self.fail(row, DeadlineExceeded("The request's time limit passed while it waited."))
