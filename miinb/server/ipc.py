"""Frames between the frontend and rank 0 of a replica, over a unix stream socket.

A frame is `u32 payload length | u8 kind | payload`, little-endian; docs/internals.md lists the kinds. Requests, ends
and errors are JSON; token ids are packed int32, one TOKENS frame a step for all rows. Rank 0 uses `RankSocket`
(synchronous, never blocks in a send), the frontend `RankChannel` (asyncio). No pickle: a peer can only send what
`encode` can say.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import select
import socket
import struct
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from miinb.config import GenerationParams
from miinb.errors import MiinbError
from miinb.messages import (
    EngineInfo,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    PredictedEvent,
    PredictRequest,
    SequenceRequest,
    TokenLogprob,
    TokensEvent,
    from_dict,
)

HEADER = struct.Struct("<IB")
LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 256 << 20
MAX_OUTBOX_BYTES = 64 << 20
RECEIVE_BYTES = 1 << 18


class Kind(IntEnum):
    """The kinds of frames, by their byte on the wire."""

    HELLO = 1
    SUBMIT = 2
    CANCEL = 3
    TOKENS = 4
    LOGPROBS = 5
    FINISHED = 6
    FAILED = 7
    PREDICT = 8
    PREDICTED = 9
    STATUS = 10


@dataclass(frozen=True, slots=True)
class CancelRow:
    """Frontend to rank 0: this row is not wanted any more."""

    row_id: int
    reason: FinishReason = "cancelled"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A question (no values, to rank 0) and its answer: running, waiting, KV cache use, memory."""

    values: Mapping[str, Any] = field(default_factory=dict)


ToRank = SequenceRequest | CancelRow | PredictRequest | EngineStatus
ToFrontend = EngineInfo | TokensEvent | FinishedEvent | FailedEvent | PredictedEvent | EngineStatus
Message = ToRank | ToFrontend

_KINDS: dict[type, Kind] = {
    EngineInfo: Kind.HELLO,
    CancelRow: Kind.CANCEL,
    FinishedEvent: Kind.FINISHED,
    FailedEvent: Kind.FAILED,
    PredictRequest: Kind.PREDICT,
    PredictedEvent: Kind.PREDICTED,
}
_CLASSES: dict[Kind, type] = {kind: cls for cls, kind in _KINDS.items() if cls is not EngineInfo}
#: What of a SequenceRequest is JSON as it is: all but what is packed and what has its own JSON.
_PLAIN = tuple(f.name for f in dataclasses.fields(SequenceRequest) if f.name not in ("token_ids", "params"))


def frame(kind: Kind, *parts: bytes) -> bytes:
    """One frame of these payload parts."""
    payload = b"".join(parts)
    return HEADER.pack(len(payload), kind) + payload


def encode(message: Message) -> bytes:
    """The frames of a message (two for tokens with log-probabilities)."""
    if isinstance(message, TokensEvent):
        tokens = _tokens_frame({message.row_id: message.token_ids})
        return _logprobs_frame(message) + tokens if message.logprobs else tokens
    if isinstance(message, SequenceRequest):
        plain = {name: getattr(message, name) for name in _PLAIN}
        head = _json({**plain, "params": message.params.model_dump(mode="json", exclude_defaults=True)})
        return frame(Kind.SUBMIT, LENGTH.pack(len(head)), head, array("i", message.token_ids).tobytes())
    if isinstance(message, EngineStatus):
        return frame(Kind.STATUS, _json(dict(message.values)))
    return frame(_KINDS[type(message)], _json(dataclasses.asdict(message)))


def _json(values: object) -> bytes:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _tokens_frame(rows: Mapping[int, Sequence[int]]) -> bytes:
    packed = array("i")
    for row_id, ids in rows.items():
        packed.append(row_id)
        packed.append(len(ids))
        packed.extend(ids)
    return frame(Kind.TOKENS, packed.tobytes())


def _logprobs_frame(event: TokensEvent) -> bytes:
    rows = [[entry.token_id, entry.logprob, entry.top] for entry in event.logprobs]
    return frame(Kind.LOGPROBS, _json({"row_id": event.row_id, "logprobs": rows}))


class Decoder:
    """Turns received bytes into messages. Holds the log-probabilities that wait for their TOKENS frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._logprobs: dict[int, tuple[TokenLogprob, ...]] = {}

    def feed(self, data: bytes) -> list[Message]:
        """The messages that these bytes complete.

        Raises:
            ConnectionError: the peer does not speak this protocol.
        """
        buffer = self._buffer
        buffer += data
        messages: list[Message] = []
        at = 0
        while len(buffer) - at >= HEADER.size:
            length, kind = HEADER.unpack_from(buffer, at)
            if length > MAX_FRAME_BYTES:
                raise ConnectionError(f"a frame of {length} bytes is above the limit")
            end = at + HEADER.size + length
            if len(buffer) < end:
                break
            try:
                messages.extend(self._message(kind, bytes(memoryview(buffer)[at + HEADER.size : end])))
            except (LookupError, ValueError, TypeError, AttributeError, struct.error, MiinbError) as error:
                raise ConnectionError(f"a frame of kind {kind} cannot be read: {error}") from error
            at = end
        del buffer[:at]
        return messages

    def _message(self, kind: int, payload: bytes) -> Iterable[Message]:
        if kind == Kind.TOKENS:
            return self._tokens(payload)
        if kind == Kind.SUBMIT:
            (length,) = LENGTH.unpack_from(payload)
            head = json.loads(payload[LENGTH.size : LENGTH.size + length])
            head["params"] = GenerationParams.from_json(json.dumps(head["params"]))
            ids = array("i")
            ids.frombytes(payload[LENGTH.size + length :])
            return [SequenceRequest(token_ids=ids.tolist(), **head)]
        values = json.loads(payload)
        if kind == Kind.LOGPROBS:
            self._logprobs[values["row_id"]] = tuple(
                TokenLogprob(token_id, logprob, tuple((i, p) for i, p in top))
                for token_id, logprob, top in values["logprobs"]
            )
            return ()
        if kind == Kind.HELLO:
            return [EngineInfo.from_dict(values)]
        if kind == Kind.STATUS:
            return [EngineStatus(values)]
        return [from_dict(_CLASSES[Kind(kind)], values)]

    def _tokens(self, payload: bytes) -> Iterable[TokensEvent]:
        packed = array("i")
        packed.frombytes(payload)
        values = packed.tolist()
        waiting = self._logprobs
        events = []
        at, end = 0, len(values)
        while at < end:
            row_id, first = values[at], at + 2
            at = first + values[at + 1]
            logprobs = waiting.pop(row_id, ()) if waiting else ()
            events.append(TokensEvent(row_id, values[first:at], logprobs))
        return events


class RankSocket:
    """Rank 0's end: synchronous, and a send never blocks.

    Messages wait in a bounded outbox when the socket is full; TOKENS frames that wait next to each other become one.
    """

    def __init__(self, sock: socket.socket, *, max_outbox_bytes: int = MAX_OUTBOX_BYTES) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._decoder = Decoder()
        self._outbox: deque[bytes | dict[int, list[int]]] = deque()  # frames, and tokens not yet packed
        self._sending = memoryview(b"")  # the frame that is partly on its way
        self._waiting_bytes = 0
        self._limit = max_outbox_bytes
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    @classmethod
    def connect(cls, path: str | Path, *, timeout_s: float = 30.0) -> RankSocket:
        """Connect to the frontend, which may still be starting.

        Raises:
            ConnectionError: nobody listened within the time.
        """
        end = time.monotonic() + timeout_s
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(path))
                return cls(sock)
            except (FileNotFoundError, ConnectionRefusedError) as error:
                sock.close()
                if time.monotonic() > end:
                    raise ConnectionError(f"the frontend did not listen within {timeout_s:.0f} s") from error
                time.sleep(0.05)

    def fileno(self) -> int:
        """The socket's file descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; what waits in the outbox is lost."""
        self._socket.close()

    def send(self, *messages: ToFrontend) -> None:
        """Put messages into the outbox, in order; the TOKENS events of one call travel in one frame.

        Raises:
            ConnectionError: the outbox is full: the frontend does not read any more.
        """
        for message in messages:
            if isinstance(message, TokensEvent):
                self._send_tokens(message)
            else:
                self._append(encode(message))
        if self._waiting_bytes > self._limit:
            raise ConnectionError("the frontend does not read its socket")

    def _send_tokens(self, event: TokensEvent) -> None:
        if event.logprobs:  # their frame must come right before the tokens that they belong to
            self._append(encode(event))
            return
        if not self._outbox or not isinstance(self._outbox[-1], dict):
            self._outbox.append({})
        tail = self._outbox[-1]
        if isinstance(tail, dict):
            tail.setdefault(event.row_id, []).extend(event.token_ids)
        self._waiting_bytes += 4 * len(event.token_ids)

    def _append(self, data: bytes) -> None:
        self._outbox.append(data)
        self._waiting_bytes += len(data)

    @property
    def empty(self) -> bool:
        """Whether everything has been handed to the kernel."""
        return not self._outbox and not self._sending

    def flush(self) -> bool:
        """Send what the socket takes now; True when nothing waits any more.

        Raises:
            ConnectionError: the frontend is gone.
        """
        while not self.empty:
            if not self._sending:
                head = self._outbox.popleft()
                self._sending = memoryview(_tokens_frame(head) if isinstance(head, dict) else head)
                self._waiting_bytes -= 4 * sum(map(len, head.values())) if isinstance(head, dict) else len(head)
            try:
                self._sending = self._sending[self._socket.send(self._sending) :]
            except BlockingIOError:
                return False
        return True

    def receive(self, timeout_s: float | None = 0.0) -> list[ToRank]:
        """Everything that has arrived, flushing the outbox meanwhile.

        Args:
            timeout_s: how long to wait for a first message; 0 does not wait, None waits for ever.

        Raises:
            ConnectionError: the frontend is gone.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        messages: list[Message] = []
        while not messages:
            wanted = select.POLLIN if self.flush() else select.POLLIN | select.POLLOUT
            self._poll.modify(self._socket, wanted)
            left = None if end is None else max(0.0, end - time.monotonic())
            ready = self._poll.poll(None if left is None else left * 1000)
            if any(events & ~select.POLLOUT for _, events in ready):
                messages = self._drain()
            elif not ready:
                break
        return messages  # type: ignore[return-value]  # the frontend sends only these kinds

    def _drain(self) -> list[Message]:
        messages: list[Message] = []
        while True:
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return messages
            if not data:
                raise ConnectionError("the frontend is gone")
            messages += self._decoder.feed(data)
            if len(data) < RECEIVE_BYTES:
                return messages


class RankChannel(asyncio.Protocol):
    """The frontend's end of one replica's connection.

    Attributes:
        on_messages: called in the event loop with the messages that have arrived.
        on_closed: called once when rank 0 is gone or does not speak the protocol.
    """

    def __init__(
        self,
        on_messages: Callable[[RankChannel, Sequence[ToFrontend]], None],
        on_closed: Callable[[RankChannel], None],
    ) -> None:
        self.on_messages = on_messages
        self.on_closed = on_closed
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = transport  # type: ignore[assignment]  # a stream socket's transport is a Transport

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        try:
            messages = self._decoder.feed(data)
        except ConnectionError:
            self.close()
            return
        self.on_messages(self, messages)  # type: ignore[arg-type]  # a rank sends only these kinds

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._transport = None
        self.on_closed(self)

    def send(self, message: ToRank) -> bool:
        """Queue a message; False when the rank is gone or has stopped reading."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        if transport.get_write_buffer_size() > MAX_OUTBOX_BYTES:
            transport.abort()
            return False
        transport.write(encode(message))
        return True

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()


async def listen(path: Path, make_channel: Callable[[], RankChannel]) -> asyncio.Server:
    """Listen for ranks on a unix socket that only this user can open."""
    path.unlink(missing_ok=True)
    server = await asyncio.get_running_loop().create_unix_server(make_channel, str(path))
    path.chmod(0o600)
    return server
