"""Which replica takes a request: the one with the fewest rows. Rows of a replica that goes away fail at once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from miinb.errors import InvalidRequest, QueueFull, Unavailable
from miinb.image_messages import PaintedEvent, PaintProgress, PaintRequest
from miinb.messages import (
    EncodedEvent,
    EncodeRequest,
    EngineInfo,
    Event,
    FailedEvent,
    SequenceRequest,
    TokensEvent,
)
from miinb.rpc import failures
from miinb.server.encoders.tokenization import EncoderText
from miinb.server.frames import CancelRow, EngineStatus, ToFrontend
from miinb.server.ipc import RankChannel
from miinb.server.text import TextCodec

#: What a replica tells of a row.
RowEvent = Event | EncodedEvent | PaintProgress | PaintedEvent
#: Takes the events of one row, in the event loop.
Sink = Callable[[RowEvent], None]

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Replica:
    """One copy of the model: the connection to its rank 0 and the rows that it has.

    Attributes:
        text: its tokenizer: of a task that streams text, of an encoder, or None.
        tokens: of the requests of an encoder that it has.
        heard: it has sent something since the last `Balancer.silent()`.
        asked_at: when it was asked for a sign of life that has not come; None: it owes none.
        leave_by: it is to go when it has no rows, at the latest then (time.monotonic); None: it stays.
    """

    channel: RankChannel
    info: EngineInfo
    text: TextCodec | EncoderText | None
    rows: dict[int, Sink] = field(default_factory=dict)
    heard: bool = False
    asked_at: float | None = None
    leave_by: float | None = None
    tokens: int = 0
    _sizes: dict[int, int] = field(default_factory=dict)
    _left: dict[int, Sink] = field(default_factory=dict)  # of canceled rows that it has not let go

    def submit(self, request: SequenceRequest | EncodeRequest | PaintRequest, sink: Sink) -> None:
        """Hand a row to the replica; `sink` gets its events.

        Raises:
            Unavailable: the replica is gone.
            QueueFull: it has not read what was sent before.
        """
        if self.channel.full:
            raise QueueFull("The replica has not read the requests before this one.", hint="Try again later.")
        if not self.channel.send(request):
            raise _gone()
        self.rows[request.row_id] = sink
        if isinstance(request, EncodeRequest):
            self._sizes[request.row_id] = len(request.token_ids)
            self.tokens += len(request.token_ids)

    def end(self, row_id: int) -> Sink:
        """Forget a row that has ended; its sink gets the end."""
        self.tokens -= self._sizes.pop(row_id, 0)
        self._left.pop(row_id, None)
        return self.rows.pop(row_id, _drop)

    def stop(self, row_id: int) -> None:
        """A stop string was found: the row ends as "stop", and its end is still told to its sink."""
        if row_id in self.rows:
            self.channel.send(CancelRow(row_id, "stop"))

    def cancel(self, row_id: int) -> None:
        """End a row; what it still sends is dropped. It counts as load until the replica has let it go."""
        if (sink := self.rows.get(row_id, _drop)) is not _drop:
            self.rows[row_id], self._left[row_id] = _drop, sink
            self.channel.send(CancelRow(row_id))

    @property
    def left(self) -> int:
        """Requests that are canceled, and that it may still compute: rows of one request have the same sink."""
        return len(set(self._left.values()))


class Balancer:
    """The ready replicas.

    Args:
        load_text: reads the tokenizer of a replica; runs in a thread.
        max_queue: rows that may wait in a replica above its `max_batch`.
        on_change: called when the number of ready replicas changes.
        on_left: called when a replica has let a canceled row go.
    """

    def __init__(
        self,
        load_text: Callable[[EngineInfo], TextCodec | EncoderText | None],
        *,
        max_queue: int,
        on_change: Callable[[], None] = lambda: None,
        on_left: Callable[[], None] = lambda: None,
    ) -> None:
        self._load_text = load_text
        self._max_queue = max_queue
        self._on_change = on_change
        self._on_left = on_left
        self._replicas: dict[RankChannel, Replica] = {}
        self._open: set[RankChannel] = set()
        self._first = asyncio.Event()
        self._row_ids = itertools.count(1)
        self._admissions: set[asyncio.Task[None]] = set()
        self.stopping = False  # the deployment is: requests that end with a replica are told so

    def make_channel(self) -> RankChannel:
        """A connection for `ipc.listen`."""
        channel = RankChannel(self._on_messages, self._on_closed)
        self._open.add(channel)
        return channel

    def next_row_id(self) -> int:
        """A number that no other row of this frontend has."""
        return next(self._row_ids)

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """The ready replicas."""
        return tuple(self._replicas.values())

    @property
    def left(self) -> int:
        """Canceled requests that replicas may still compute, though nobody waits for them."""
        return sum(replica.left for replica in self._replicas.values())

    async def pick(self, rows: int, *, patience_s: float = 2.0) -> Replica:
        """The replica with the fewest tokens of an encoder's requests, or rows; if it has room for so many rows.

        Waits a little for the very first one.

        Raises:
            Unavailable: no replica is ready.
            QueueFull: too many rows wait already.
            InvalidRequest: there is never room for so many.
        """
        if not self._first.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._first.wait(), patience_s)
        if not self._replicas:
            hint = "One that has ended is started again: ask again in some seconds, or see status() and logs()."
            raise Unavailable("No replica of the model is ready.", hint=hint)
        staying = [candidate for candidate in self._replicas.values() if candidate.leave_by is None]
        candidates = staying or self._replicas.values()
        replica = min(candidates, key=lambda candidate: (candidate.tokens, len(candidate.rows)))
        most = replica.info.max_batch + self._max_queue
        if rows > most:  # nobody should wait for what never comes
            hint = "Ask for fewer at once, or raise options.max_queue."
            raise InvalidRequest(f"The deployment takes {most} at once, fewer than these {rows}.", hint=hint)
        if rows > most - len(replica.rows):
            raise QueueFull(
                f"{len(replica.rows)} requests run or wait already; {rows} more would not fit.",
                hint="Try again later, or raise options.max_queue.",
            )
        return replica

    def silent(self) -> dict[int, float]:
        """Replicas with rows that do not answer, and for how many seconds; to be called about once a second."""
        now = time.monotonic()
        found = {}
        for replica in self._replicas.values():
            if replica.heard or not replica.rows:
                replica.heard, replica.asked_at = False, None
            elif replica.asked_at is None:
                replica.asked_at = now
                replica.channel.send(EngineStatus())
            else:
                found[replica.info.replica] = now - replica.asked_at
        return found

    def leave(self, number: int, drain_s: float) -> None:
        """Give a replica no more rows while there are others; `let_go` ends it when its own have ended."""
        for replica in self._replicas.values():
            if replica.info.replica == number:
                replica.leave_by = time.monotonic() + drain_s

    def let_go(self) -> None:
        """Part with replicas that are to leave and have no rows, or had long enough for them."""
        now = time.monotonic()
        for channel, replica in tuple(self._replicas.items()):
            if replica.leave_by is not None and (not replica.rows or now >= replica.leave_by):
                channel.close()

    def close(self) -> None:
        """Close every connection."""
        for channel in tuple(self._open):
            channel.close()

    def _on_messages(self, channel: RankChannel, messages: Sequence[ToFrontend]) -> None:
        """Hand each event to its row's sink. At full load this runs for every token of every stream."""
        replica = self._replicas.get(channel)
        rows = replica.rows if replica is not None else {}
        if replica is not None:
            replica.heard = True
        for message in messages:
            if type(message) is TokensEvent or type(message) is PaintProgress:
                if (sink := rows.get(message.row_id)) is not None:
                    sink(message)
            elif isinstance(message, EngineInfo) and replica is not None:
                replica.info = message  # its plan has changed
            elif isinstance(message, EngineInfo):
                task = asyncio.ensure_future(self._admit(channel, message))
                self._admissions.add(task)
                task.add_done_callback(self._admissions.discard)
            elif replica is not None and not isinstance(message, EngineStatus):
                sink = replica.end(message.row_id)
                sink(message)
                if sink is _drop:
                    self._on_left()

    async def _admit(self, channel: RankChannel, info: EngineInfo) -> None:
        try:
            text = await asyncio.to_thread(self._load_text, info)
        except Exception:
            log.exception("the tokenizer of replica %d cannot be read", info.replica)
            channel.close()
            return
        if channel in self._open:
            self._replicas[channel] = Replica(channel, info, text)
            self._first.set()
            self._on_change()

    def _on_closed(self, channel: RankChannel) -> None:
        self._open.discard(channel)
        replica = self._replicas.pop(channel, None)
        if replica is None:
            return
        log.warning("replica %d is gone, with %d rows", replica.info.replica, len(replica.rows))
        error = failures.stopped() if self.stopping else _gone()
        for row_id, sink in tuple(replica.rows.items()):
            sink(FailedEvent(row_id, type(error).__name__, error.message, error.hint))
        replica.rows.clear()
        self._on_change()


def _gone() -> Unavailable:
    return Unavailable("The replica that ran this request is gone.", hint="Ask again; see logs() for the cause.")


def _drop(event: RowEvent) -> None:
    """The sink of a canceled row."""
