"""One generate request in the frontend: its rows, their text, its end. Knows neither gRPC nor protobuf."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from miinb.config import MAX_SEED
from miinb.errors import InvalidRequest, MiinbError, from_name
from miinb.messages import (
    Chunk,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    RequestBegin,
    RequestEnd,
    SequenceEnd,
    SequenceRequest,
    StreamEvent,
    Timing,
    TokenLogprob,
    TokensEvent,
    Usage,
)
from miinb.server.balancer import Balancer, Replica, RowEvent
from miinb.server.prompts import Message, Prompt, check_token_ids, tokenize
from miinb.server.text import Detokenizer, StopFinder, TextCodec
from miinb.tasks import find_task

#: Paced streams wake on a common grid: many in one turn of the event loop cost less than each in its own.
TICK_S = 0.01
SEED_BITS = 32  # of a drawn seed: short enough to be typed again


@dataclass(slots=True)
class Row:
    """One sequence of the request."""

    index: int
    row_id: int
    detokenizer: Detokenizer
    stops: StopFinder
    has_stops: bool
    prefix: str  # shown before the first new text: the prompt, if asked for
    new_ids: list[int] = field(default_factory=list)  # arrived, not yet looked at
    ids: list[int] = field(default_factory=list)  # of text not yet shown
    logprobs: list[TokenLogprob] = field(default_factory=list)
    output_tokens: int = 0
    stopped: bool = False  # a stop string was found
    finished: FinishedEvent | None = None

    def advance(self) -> Iterator[Chunk | SequenceEnd]:
        """Events of the tokens that have arrived, and the end when the row is complete."""
        if self.stopped:
            self.new_ids.clear()
            self.logprobs.clear()
            return
        text = self._read_tokens()
        if self.finished and not self.stopped:
            tail, self.stopped = self.stops.add(self.detokenizer.finish())
            text += tail if self.stopped else tail + self.stops.finish()
        done = self.stopped or self.finished is not None
        if text or (done and self.ids):
            text, self.prefix = self.prefix + text, ""
            count = len(self.ids)
            yield Chunk(text, tuple(self.ids), self.index, tuple(self.logprobs[:count]))
            self.ids.clear()
            del self.logprobs[:count]
        if done:
            reason = "stop" if self.stopped or self.finished is None else self.finished.finish_reason
            yield SequenceEnd(self.index, reason, self.output_tokens)

    def _read_tokens(self) -> str:
        # With stop strings token by token: none after the one that completes a stop string counts.
        pieces = [[token] for token in self.new_ids] if self.has_stops else [self.new_ids] if self.new_ids else []
        text = ""
        for ids in pieces:
            shown, self.stopped = self.stops.add(self.detokenizer.add(ids))
            text += shown
            self.ids += ids
            self.output_tokens += len(ids)
            if self.stopped:
                break
        self.new_ids = []
        return text


class Generation:
    """A running request. `events()` yields its answer; `cancel()` frees what still runs.

    Args:
        pace_s: the least time between two chunks, asked anew for each.
    """

    def __init__(self, replica: Replica, text: TextCodec, prompt: Prompt, pace_s: Callable[[], float]) -> None:
        self.seed = 0
        self.prompt = prompt
        self._replica = replica
        self._text = text
        self._rows: dict[int, Row] = {}
        self._pace_s = pace_s
        self._touched: dict[int, Row] = {}  # rows with events since the last look
        self._failure: MiinbError | None = None
        self._arrived = asyncio.Event()
        self._not_before = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._tokenize_s = 0.0
        self._detokenize_s = 0.0

    @classmethod
    async def start(
        cls,
        request: GenerateRequest,
        balancer: Balancer,
        *,
        t_submit: float,
        deadline: float,
        pace_s: Callable[[], float],
        history: Sequence[Message] = (),
    ) -> Generation:
        """Check and tokenize the request and hand its rows to the least loaded replica.

        Raises:
            InvalidRequest, PromptTooLong, QueueFull, Unavailable: it cannot be served; nothing was started.
        """
        params = request.params
        replica = await balancer.pick(params.num_return_sequences)
        text = replica.text
        if not isinstance(text, TextCodec):
            task = find_task(replica.info.task)
            raise InvalidRequest(f"This deployment serves {task.name}.", hint=f"Use {task.asked_by}().")
        check_token_ids(params, replica.info.vocab_size)
        begin = time.perf_counter()
        prompt = await tokenize(request, text, replica.info.max_length, history)
        tokenize_s = time.perf_counter() - begin
        replica = await balancer.pick(params.num_return_sequences)  # it may have gone or filled meanwhile
        self = cls(replica, text, prompt, pace_s)
        self._tokenize_s = tokenize_s
        try:
            self._submit(request, balancer.next_row_id, t_submit, deadline)
        except BaseException:
            self.cancel()
            raise
        return self

    def _submit(
        self, request: GenerateRequest, next_row_id: Callable[[], int], t_submit: float, deadline: float
    ) -> None:
        params, text, ids = request.params, self._text, self.prompt.token_ids
        self.seed = secrets.randbits(SEED_BITS) if params.seed is None else params.seed
        for index in range(params.num_return_sequences):
            seeded = params.model_copy(update={"seed": (self.seed + index) % (MAX_SEED + 1)})
            row_id = next_row_id()
            stops = StopFinder(params.stop)
            self._rows[row_id] = Row(index, row_id, text.detokenizer(ids), stops, bool(params.stop), self.prompt.shown)
            self._replica.submit(SequenceRequest(row_id, ids, seeded, t_submit, deadline, index), self._push)

    def _push(self, event: RowEvent) -> None:
        """Takes an event from the balancer; tokens of a paced stream wait for its turn."""
        row = self._touched[event.row_id] = self._rows[event.row_id]
        if type(event) is TokensEvent:
            row.new_ids += event.token_ids
            row.logprobs += map(self._with_texts, event.logprobs) if event.logprobs else ()
            if self._timer is not None or self._arrived.is_set():
                return
            wait_s = self._not_before - time.monotonic()
            if wait_s > 0:
                self._timer = asyncio.get_running_loop().call_later(wait_s, self._arrived.set)
                return
        elif isinstance(event, FinishedEvent):
            row.finished = event
        elif isinstance(event, FailedEvent):
            self._failure = from_name(event.error, event.message)
            self._failure.hint = event.hint
        self._arrived.set()

    def _with_texts(self, entry: TokenLogprob) -> TokenLogprob:
        text = self._text
        tops = tuple(text.token_text(token_id) for token_id, _ in entry.top)
        return replace(entry, text=text.token_text(entry.token_id), top_texts=tops)

    async def events(self) -> AsyncIterator[StreamEvent]:
        """The answer as it comes: what has arrived since the last look is one chunk a sequence.

        Raises:
            MiinbError: a row failed; the others are canceled.
        """
        yield RequestBegin(len(self.prompt.token_ids), self.prompt.dropped)
        running = set(self._rows)
        while running:
            await self._arrived.wait()
            self._arrived.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._failure is not None:
                raise self._failure
            touched, self._touched = self._touched, {}
            for row in touched.values():
                begin = time.perf_counter()
                events = list(row.advance())
                self._detokenize_s += time.perf_counter() - begin
                if row.finished is not None:
                    running.discard(row.row_id)
                elif row.stopped and events:
                    self._replica.stop(row.row_id)
                for event in events:
                    yield event
            pace_s = self._pace_s()
            self._not_before = math.ceil((time.monotonic() + pace_s) / TICK_S) * TICK_S if pace_s else 0.0
        yield self._end()

    def _end(self) -> RequestEnd:
        rows = self._rows.values()
        ends = [row.finished for row in rows if row.finished is not None]
        return RequestEnd(
            Usage(
                len(self.prompt.token_ids),
                self.output_tokens,
                cached_tokens=min(end.cached_tokens for end in ends),
                draft_tokens=sum(end.draft_tokens for end in ends),
                accepted_tokens=sum(end.accepted_tokens for end in ends),
            ),
            Timing(
                queue_s=max(end.queue_s for end in ends),
                tokenize_s=self._tokenize_s,
                model_s=max(end.model_s for end in ends),
                detokenize_s=self._detokenize_s,
            ),
            self.seed,
        )

    @property
    def output_tokens(self) -> int:
        """New tokens so far, of all sequences."""
        return sum(row.output_tokens for row in self._rows.values())

    def cancel(self) -> None:
        """End every row that still runs; safe to call at any time."""
        if self._timer is not None:
            self._timer.cancel()
        for row in self._rows.values():
            if row.finished is None:
                self._replica.cancel(row.row_id)
