"""Continuous batching: which rows compute how many tokens in the next step. Pure Python, no torch.

The scheduler has the order: who computes, who waits, who goes back. The pages and slots themselves are `RowMemory`'s.
Rows are served in order of arrival; of those that arrive between two steps, in practice the prompts of one call, the
longest answers go first, as the call ends with them. Each step gives one token to every decoding row and fills what is
left of `max_step_tokens` with prompts, in chunks (Sarathi-Serve, arXiv:2403.02310). Memory is counted in pages
(PagedAttention, arXiv:2309.06180). When pages run out the youngest row gives its pages back and is computed again
later: nothing is lost, and because no younger row ever goes first, the oldest row always makes progress and none
starves. A long prompt leaves half of a step's room to those who came after it.

`schedule` may run ahead of `complete` by a step: the tokens of step n are then still on the GPU while step n+1 is
planned. So a row's end (EOS) acts one step late, and the pages of a row are given back only when no step in flight can
write them. A draft (speculation) needs the tokens before it: a row with one in flight waits for that step.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from miinb.engine.drafts import Drafts, most_places
from miinb.engine.row_memory import RowMemory
from miinb.engine.rows import Order, Row, RowState, StepPlan, check_request
from miinb.errors import DeadlineExceeded, MiinbError, NonFinite, QueueFull
from miinb.messages import Event, FailedEvent, FinishReason, SequenceRequest, TokenLogprob, TokensEvent

RUNNING, ENDED = RowState.RUNNING, RowState.ENDED


class Scheduler:
    """Admits, plans, preempts and ends rows.

    Args:
        pages, page_tokens: pages of the KV cache, and tokens in a page.
        max_batch: most rows at once (also the number of slots); at most `max_step_tokens` of them are used.
        max_length: longest prompt and answer together.
        vocab_size: tokens in the vocabulary.
        max_step_tokens: most tokens in a step.
        max_queue: most rows that wait.
        eos_token_ids: tokens that end a row unless its parameters say otherwise.
        prefix_cache: reuse the pages of equal prefixes, or of slots where a page holds a whole row.
        speculative: guess tokens, in the places that the batch has left.

    Attributes:
        pool: the pages of the KV cache.
        drafts, preemptions: what they did since the start.
        max_places: most places in a step: of rows, and of the tokens of drafts.
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
        speculative: bool = False,
    ) -> None:
        self.max_batch = min(max_batch, max_step_tokens)
        whole = page_tokens >= max_length
        self._memory = RowMemory(pages, page_tokens, self.max_batch, whole=whole, prefix_cache=prefix_cache)
        self.pool = self._memory.pool
        self.max_places = most_places(max_batch, max_step_tokens, speculative=speculative)
        self.speculative = speculative
        self.drafts = Drafts()
        self.max_length = min(max_length, pages * page_tokens)
        self.vocab_size = vocab_size
        self.max_step_tokens = max_step_tokens
        self.max_queue = max_queue
        self.preemptions = 0
        self._worth_waiting = max_step_tokens // 4 if prefix_cache else 1 << 60  # tokens of a prompt, see `_lends`
        self._eos = frozenset(eos_token_ids)
        self._rows: dict[int, Row] = {}  # not ended
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []  # in order of arrival
        self._suspects: deque[Row] = deque()  # of a step that raised: each is computed alone, to see whose fault it is
        self._deadlines: list[tuple[float, Order, Row]] = []
        self._events: list[Event] = []
        self._arrivals = self._plans = 0

    # ------------------------------------------------------------------ rows come and go

    def submit(self, request: SequenceRequest) -> None:
        """Queue a row.

        Raises:
            InvalidRequest, PromptTooLong: it can never be computed.
            QueueFull: `max_queue` rows wait.
        """
        check_request(request, self.max_length, self.vocab_size)
        # What arrives between two steps waits for slots, not for others.
        if len(self._waiting) >= self.max_queue + self._memory.free_slots:
            raise QueueFull(f"{len(self._waiting)} rows wait already.", hint="Try again later.")
        params = request.params
        eos = frozenset(params.eos_token_id) if params.eos_token_id is not None else self._eos
        order = (self._plans, -params.max_new_tokens, self._arrivals)
        row = Row(request, order, frozenset() if params.ignore_eos else eos)
        if self.speculative:
            self.drafts.enable(row, params)
        self._arrivals += 1
        self._rows[row.row_id] = row
        insort(self._waiting, row)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, row.order, row))

    def cancel(self, row_id: int, reason: FinishReason, now: float) -> None:
        """End a row before the next step; a row that has ended is left alone."""
        if row := self._rows.get(row_id):
            self._finish(row, reason, now)

    def fail(self, row: Row, error: MiinbError) -> None:
        """End a row with an error of its own."""
        if row.state is not ENDED:
            self._events.append(FailedEvent(row.row_id, type(error).__name__, error.message, error.hint))
            self._end(row)

    def take_events(self) -> list[Event]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def take_blank(self) -> list[int]:
        """Freed pages that may hold NaN: they are to be zeroed before the next step (masked NaN is still NaN)."""
        return self._memory.take_blank()

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

    @property
    def drafting(self) -> bool:
        """Whether a running row guesses tokens."""
        return self.speculative and any(row.lookup is not None for row in self._running)

    def check(self) -> None:
        """Compare the books of pages and slots with the rows (for tests). Raises RuntimeError."""
        self._memory.check(self._running)

    # ------------------------------------------------------------------ a step

    def schedule(self, now: float) -> StepPlan | None:
        """Plan the next step; None if nothing can be computed before a step in flight is complete, or at all."""
        self._expire(now)
        self._plans += 1
        plan = StepPlan()
        if self._suspects:
            self._isolate(plan, now)
        if not plan.rows:
            self._fill(plan, now)
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
        size = self.pool.page_tokens if self.pool.prefix_cache else 1 << 60
        steps = zip(plan.rows, plan.starts, plan.counts, plan.samples, token_ids, finite, strict=True)
        for i, (row, start, count, samples, token_id, is_finite) in enumerate(steps):
            row.in_flight -= 1
            if not is_finite:
                row.poisoned = True
            # A place that went on from a wrong guess says nothing.
            if samples and row.state is not ENDED and (not row.draft or self.drafts.confirm(row, start)):
                if is_finite:
                    if start + count >= (row.registered + 1) * size:
                        self._memory.register(row, start + count)
                    self._take(row, token_id, now, (logprobs[i],) if logprobs and i in logprobs else ())
                else:
                    self.fail(row, NonFinite("The model produced NaN or infinity for this request."))
            if row.in_flight == 0:
                row.draft = ()
                if row in self._memory.leaving:
                    self._memory.release(row)

    def abandon(self, plan: StepPlan, suspects: Collection[Row], error: MiinbError) -> None:
        """Undo a step that raised.

        The suspects are next computed alone, one by one; who raises then fails with the error. If a later step went on
        from this one they fail together. The other rows are as they were before the step.
        """
        ends = dict(zip(plan.rows, plan.ends, strict=True))
        went_on = any(row.state is RUNNING and row.computed != ends[row] for row in suspects)
        plan.undo()
        if len(ends) == 1 or went_on:
            for row in suspects:
                row.poisoned = True
                self.fail(row, error)
        else:
            self._suspects = deque(sorted(suspects))
        for row in reversed(plan.admitted):  # what they reuse may not have been copied
            if row.state is RUNNING:
                self._give_back(row)
        for row in self._memory.leaving.intersection(plan.rows):
            self._memory.release(row)

    # ------------------------------------------------------------------ inside

    def _isolate(self, plan: StepPlan, now: float) -> None:
        """Plan the next suspect alone, if it can be."""
        while self._suspects and not plan.rows:
            row = self._suspects.popleft()
            if self._waiting and row is self._waiting[0]:
                self._admit(plan, plan, self.max_step_tokens, now, most=1)
            elif row.state is RUNNING and not row.draft and row.length < row.limit:
                count = min(row.length - row.computed, self.max_step_tokens)
                if self._reserve(row, count):
                    plan.add(row, count)

    def _fill(self, plan: StepPlan, now: float) -> None:
        chunks = StepPlan()
        size = self.pool.page_tokens
        ready = [row for row in self._running if row.length < row.limit and not row.draft]
        budget = self.max_step_tokens - len(ready)  # for prompts, after one token for each row
        short = False
        for row in ready:
            if row.state is not RUNNING:
                continue  # preempted for an older row of this step
            count = row.length - row.computed
            if count > 1:
                count = self._chunk(row, 1 + budget)
            if row.computed + count > len(row.pages) * size and not self._reserve(row, count):
                short = True
                continue
            budget -= count - 1
            (plan if count == 1 else chunks).add(row, count)
        if self._waiting and not short:
            budget = self._admit(plan, chunks, budget, now)
        if len(plan.rows) > 1:
            plan.longest_first()
        if chunks.rows:
            budget = chunks.widen(budget, size)
        if self.speculative:
            places = self.max_places - len(plan.rows) - len(chunks.rows)
            self.drafts.add(plan, min(budget, places), self.pool)
        if chunks.rows:
            plan.extend(chunks)

    def _chunk(self, row: Row, budget: int) -> int:
        """How many tokens a row computes. A long prompt takes half of what is left: there may be rows behind it."""
        left = row.length - row.computed
        return min(left, budget) if 2 * left <= self.max_step_tokens else min(left, budget - budget // 2)

    def _reserve(self, row: Row, count: int) -> bool:
        """Pages for so many more tokens, taken from younger rows if need be. False: not in this step."""
        while not self._memory.grow(row, row.computed + count):
            if self._memory.leaving:
                return False  # pages come back when the step in flight is complete
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is row:
                return False
        return True

    def _admit(self, plan: StepPlan, chunks: StepPlan, budget: int, now: float, most: int = 1 << 30) -> int:
        """Let waiting rows in, at most so many. Returns what is left of the budget."""
        size = self.pool.page_tokens
        growing = sum(len(row.pages) * size < row.limit for row in self._running)
        prompts = [row for row in self._running if len(row.token_ids) == row.prompt_tokens]
        later: list[Row] = []
        while self._waiting and self._memory.free_slots and budget > 0 and len(plan.admitted) < most:
            row = self._waiting[0]
            if row.slot >= 0:
                break  # preempted with a step in flight: its pages and its last token come with that step
            if any(self._lends(other, row) for other in prompts):
                later.append(self._waiting.popleft())
                continue
            # Every running row shall be able to grow by a page, or this one is soon thrown out again.
            if not self._memory.seat(row, growing, self._running, plan, chunks):
                break
            self._waiting.popleft()
            growing += len(row.pages) * size < row.limit
            row.state = RUNNING
            if not row.t_start:
                row.t_start = now
                row.cached_tokens = row.computed
            insort(self._running, row)
            plan.admitted.append(row)
            prompts.append(row)
            count = self._chunk(row, budget)
            budget -= count
            (plan if count == 1 else chunks).add(row, count)
        self._waiting.extendleft(reversed(later))
        return budget

    def _lends(self, other: Row, row: Row) -> bool:
        """Whether a row had better wait for a prompt that is being computed (as the others of n of one prompt do).

        It is to begin with half of what is computed there, or it would wait for long; and with enough that computing it
        again takes longer than the two steps until it can be reused.
        """
        end = other.cached_tokens + max(self._worth_waiting, (other.prompt_tokens - other.cached_tokens) // 2)
        return end < min(row.length, other.prompt_tokens) and row.token_ids[:end] == other.token_ids[:end]

    def _preempt(self, row: Row) -> None:
        self.preemptions += 1
        self._give_back(row)

    def _give_back(self, row: Row) -> None:
        """Let a running row wait again, before all others."""
        self._running.remove(row)
        row.state = RowState.WAITING
        row.computed = 0
        self._waiting.appendleft(row)
        self._memory.leave(row)

    def _take(self, row: Row, token_id: int, now: float, logprobs: tuple[TokenLogprob, ...]) -> None:
        """A row's next token."""
        row.token_ids.append(token_id)
        if not row.t_first:
            row.t_first = now
        self._events.append(TokensEvent(row.row_id, (token_id,), logprobs))
        if token_id in row.eos:
            self._finish(row, "stop", now)
        elif len(row.token_ids) == row.limit:
            self._finish(row, "length", now)

    def _finish(self, row: Row, reason: FinishReason, now: float) -> None:
        self._events.append(row.finished(reason, now))
        self._end(row)

    def _end(self, row: Row) -> None:
        del self._rows[row.row_id]
        if row.state is RUNNING:
            self._running.remove(row)
            row.state = ENDED
            self._memory.leave(row)
        else:
            self._waiting.remove(row)
            row.state = ENDED

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            row = heapq.heappop(self._deadlines)[2]
            if row.state is RowState.WAITING and not row.t_start:
                self.fail(row, DeadlineExceeded("The request's time limit passed while it waited."))
