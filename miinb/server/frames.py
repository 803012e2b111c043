"""Frames between the frontend and rank 0 of a replica: what a message is as bytes.

A frame is `u32 payload length | u8 kind | payload`, little-endian; docs/internals.md lists the kinds. Requests, ends
and errors are JSON; token ids and an encoder's results are packed, one TOKENS frame a step for all rows. No pickle: a
peer can only send what `encode` can say.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from miinb.config import GenerationParams
from miinb.errors import MiinbError
from miinb.image_messages import PaintedEvent, PaintProgress, PaintRequest, PaintSource
from miinb.image_params import ImageParams
from miinb.messages import (
    EncodedEvent,
    EncodeRequest,
    EngineInfo,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    SequenceRequest,
    TokenLogprob,
    TokensEvent,
    from_dict,
)

HEADER = struct.Struct("<IB")
LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 256 << 20
#: Of a decoder's buffer, unless a frame is larger: the pixels of 512 x 512 are read to their place.
SPACE_BYTES = 1 << 20


class Kind(IntEnum):
    """The kinds of frames, by their byte on the wire."""

    HELLO = 1
    SUBMIT = 2
    CANCEL = 3
    TOKENS = 4
    LOGPROBS = 5
    FINISHED = 6
    FAILED = 7
    STATUS = 10
    ENCODE = 11
    ENCODED = 12
    PAINT = 13
    PROGRESS = 14
    PAINTED = 15
    SOURCE = 16


@dataclass(frozen=True, slots=True)
class CancelRow:
    """Frontend to rank 0: this row is not wanted any more."""

    row_id: int
    reason: FinishReason = "cancelled"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A question (no values, to rank 0) and its answer: running, waiting, KV cache use, memory."""

    values: Mapping[str, Any] = field(default_factory=dict)


ToRank = SequenceRequest | CancelRow | EncodeRequest | PaintRequest | EngineStatus
ImageEvent = PaintProgress | PaintedEvent
ToFrontend = EngineInfo | TokensEvent | FinishedEvent | FailedEvent | EncodedEvent | ImageEvent | EngineStatus
Message = ToRank | ToFrontend

_KINDS: dict[type, Kind] = {
    EngineInfo: Kind.HELLO,
    CancelRow: Kind.CANCEL,
    FinishedEvent: Kind.FINISHED,
    FailedEvent: Kind.FAILED,
}
_CLASSES: dict[Kind, type] = {kind: cls for cls, kind in _KINDS.items() if cls is not EngineInfo}
#: What of a SequenceRequest is JSON as it is: all but what is packed and what has its own JSON.
_PLAIN = tuple(f.name for f in dataclasses.fields(SequenceRequest) if f.name not in ("token_ids", "params"))
#: EncodeRequest: row_id, t_submit, deadline (infinite: none), bytes of the options' JSON, sizes of the packed fields.
ENCODE = struct.Struct("<q2d5I")
#: EncodedEvent: row_id, columns, queue_s, model_s, bytes of values and ids.
ENCODED = struct.Struct("<qI2d2I")


def frame(kind: Kind, *parts: bytes) -> bytes:
    """One frame of these payload parts."""
    return b"".join((HEADER.pack(sum(map(len, parts)), kind), *parts))


def pieces_of(message: Message) -> tuple[bytes | memoryview, ...]:
    """`encode` in pieces, one after another: pixels are one of them, and not copied."""
    if isinstance(message, PaintedEvent):
        return _head(Kind.PAINTED, message, "pixels"), message.pixels
    return (encode(message),)


def encode(message: Message, *, sent: PaintSource | None = None) -> bytes:
    """The frames of a message (two for tokens with log-probabilities and pictures that begin from one).

    Args:
        sent: the source that the peer was sent last: what the rows of a request share crosses once.
    """
    if isinstance(message, TokensEvent):
        tokens = tokens_frame({message.row_id: message.token_ids})
        return _logprobs_frame(message) + tokens if message.logprobs else tokens
    if isinstance(message, SequenceRequest):
        plain = {name: getattr(message, name) for name in _PLAIN}
        head = _json({**plain, "params": message.params.model_dump(mode="json", exclude_defaults=True)})
        return frame(Kind.SUBMIT, LENGTH.pack(len(head)), head, array("i", message.token_ids).tobytes())
    if isinstance(message, EngineStatus):
        return frame(Kind.STATUS, _json(dict(message.values)))
    if isinstance(message, EncodeRequest):
        return _encode_frame(message)
    if isinstance(message, EncodedEvent):
        return _encoded_frame(message)
    if isinstance(message, PaintRequest):
        return _paint_frames(message, sent)
    if isinstance(message, PaintProgress):
        return _head(Kind.PROGRESS, message, "preview") + message.preview
    if isinstance(message, PaintedEvent):
        return b"".join(pieces_of(message))
    return frame(_KINDS[type(message)], _json(dataclasses.asdict(message)))


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps makes one a call


def _json(values: object) -> bytes:
    return _ENCODER.encode(values).encode("utf-8", "replace")


def _paint_frames(request: PaintRequest, sent: PaintSource | None) -> bytes:
    source = request.source
    plain = {name: getattr(request, name) for name in request.__slots__}
    params = request.params.model_dump(mode="json", exclude_defaults=True)
    paint = frame(Kind.PAINT, _json({**plain, "params": params, "source": source is not None}))
    if source is None or source is sent:
        return paint
    return frame(Kind.SOURCE, LENGTH.pack(len(source.image)), source.image, source.mask) + paint


def _head(kind: Kind, event: ImageEvent, tail: str) -> bytes:
    """A frame up to one field of bytes, which follows as it is: JSON of the others with its length before it."""
    told = _json({name: getattr(event, name) for name in event.__slots__ if name != tail})
    size = LENGTH.size + len(told) + len(getattr(event, tail))
    return HEADER.pack(size, kind) + LENGTH.pack(len(told)) + told


def _headed(payload: memoryview) -> tuple[dict[str, Any], memoryview]:
    (length,) = LENGTH.unpack_from(payload)
    head: dict[str, Any] = json.loads(bytes(payload[LENGTH.size : LENGTH.size + length]))
    return head, payload[LENGTH.size + length :]


def _encode_frame(request: EncodeRequest) -> bytes:
    options = _json(dict(request.options)) if request.options else b""
    packed = [array("i", part).tobytes() for part in _packed_fields(request)]
    deadline = math.inf if request.deadline is None else request.deadline
    sizes = (len(options), *map(len, packed))
    return frame(Kind.ENCODE, ENCODE.pack(request.row_id, request.t_submit, deadline, *sizes), options, *packed)


def _packed_fields(request: EncodeRequest) -> tuple[Sequence[int], ...]:
    """Those that are int32 on the wire, in its order."""
    return request.token_ids, request.lengths, request.type_ids, request.wanted


def _encode_request(payload: bytes) -> EncodeRequest:
    row_id, t_submit, deadline, *sizes = ENCODE.unpack_from(payload)
    options, *packed = _parts(payload, ENCODE.size, sizes)
    token_ids, lengths, type_ids, wanted = (array("i", part) for part in packed)
    return EncodeRequest(
        row_id,
        token_ids,
        lengths,
        t_submit,
        type_ids,
        wanted,
        json.loads(options) if options else {},
        None if deadline == math.inf else deadline,
    )


def _encoded_frame(event: EncodedEvent) -> bytes:
    values, ids = event.values, event.ids
    head = ENCODED.pack(event.row_id, event.columns, event.queue_s, event.model_s, len(values), len(ids))
    return frame(Kind.ENCODED, head, values, ids)


def _encoded_event(payload: bytes) -> EncodedEvent:
    row_id, columns, queue_s, model_s, *sizes = ENCODED.unpack_from(payload)
    values, ids = _parts(payload, ENCODED.size, sizes)
    return EncodedEvent(row_id, columns, values, ids, queue_s, model_s)


def _parts(payload: bytes, at: int, sizes: Sequence[int]) -> list[bytes]:
    """What lies one after another from `at` to the end. Raises ValueError where it is more or less."""
    found = []
    for size in sizes:
        found.append(payload[at : at + size])
        at += size
    if at != len(payload):
        raise ValueError(f"{len(payload)} bytes where {at} are announced")
    return found


def tokens_frame(rows: Mapping[int, Sequence[int]]) -> bytes:
    """One TOKENS frame of these rows' new tokens."""
    packed = array("i")
    for row_id, ids in rows.items():
        packed.append(row_id)
        packed.append(len(ids))
        packed.extend(ids)
    return frame(Kind.TOKENS, packed.tobytes())


def _logprobs_frame(event: TokensEvent) -> bytes:
    rows = [[entry.token_id, entry.logprob, entry.top] for entry in event.logprobs]
    return frame(Kind.LOGPROBS, _json({"row_id": event.row_id, "logprobs": rows}))


#: What reading bytes that no peer of ours sends raises.
_UNREADABLE = (LookupError, ValueError, TypeError, AttributeError, RecursionError, struct.error, MiinbError)


def _memory(size: int) -> memoryview:
    """So many bytes, whatever they are: to write zeros first takes as long as to read a picture."""
    return np.empty(size, np.uint8).data


class Decoder:
    """Turns received bytes into messages: they are read to `space()`, then `filled(count)` gives the messages.

    It holds what comes before its message: log-probabilities, the last source.
    """

    def __init__(self) -> None:
        self._buffer = _memory(SPACE_BYTES)
        self._held = 0  # bytes of it: of a frame that has begun
        self._given = False  # pixels that lie in it belong to their message
        self._logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
        self._source: PaintSource | None = None

    def space(self) -> memoryview:
        """Where the next bytes are to lie; never empty."""
        return self._buffer[self._held :]

    def feed(self, data: bytes | memoryview) -> list[Message]:
        """`filled` of bytes that lie elsewhere."""
        messages: list[Message] = []
        while data:
            space = self.space()[: len(data)]
            space[:] = data[: len(space)]
            messages += self.filled(len(space))
            data = data[len(space) :]
        return messages

    def filled(self, count: int) -> list[Message]:
        """The messages that so many more bytes in `space()` complete.

        Raises:
            ConnectionError: the peer does not speak this protocol.
        """
        buffer, held, messages = self._buffer, self._held + count, list[Message]()
        at = needed = 0
        while held - at >= HEADER.size:
            length, kind = HEADER.unpack_from(buffer, at)
            if length > MAX_FRAME_BYTES:
                raise ConnectionError(f"a frame of {length} bytes is above the limit")
            end = at + HEADER.size + length
            if held < end:
                needed = end - at
                break
            try:
                messages.extend(self._message(kind, buffer[at + HEADER.size : end]))
            except _UNREADABLE as error:
                raise ConnectionError(f"a frame of kind {kind} cannot be read: {error}") from error
            at = end
        self._keep(at, held, max(needed, SPACE_BYTES))
        return messages

    def _keep(self, begin: int, end: int, size: int) -> None:
        """What lies between is the beginning of a frame: it moves to the front of a buffer of this size."""
        old, self._held = self._buffer, end - begin
        if self._given or size != len(old):
            self._buffer, self._given = _memory(size), False
        elif not begin:
            return
        self._buffer[: self._held] = bytes(old[begin:end])

    def _message(self, kind: int, view: memoryview) -> Iterable[Message]:
        if kind == Kind.PROGRESS:
            head, preview = _headed(view)
            return [PaintProgress(**head, preview=bytes(preview))]
        if kind == Kind.PAINTED:
            head, pixels = _headed(view)
            self._given = self._given or len(pixels) > SPACE_BYTES // 4  # smaller ones would hold too much
            return [PaintedEvent(**head, pixels=pixels if self._given else bytes(pixels))]
        payload = bytes(view)
        if kind == Kind.TOKENS:
            return self._tokens(payload)
        if kind == Kind.SUBMIT:
            (length,) = LENGTH.unpack_from(payload)
            head = json.loads(payload[LENGTH.size : LENGTH.size + length])
            head["params"] = GenerationParams.from_json(json.dumps(head["params"]))
            ids = array("i")
            ids.frombytes(payload[LENGTH.size + length :])
            return [SequenceRequest(token_ids=ids.tolist(), **head)]
        if kind == Kind.ENCODE:
            return [_encode_request(payload)]
        if kind == Kind.ENCODED:
            return [_encoded_event(payload)]
        if kind == Kind.SOURCE:
            (length,) = LENGTH.unpack_from(payload)
            image, mask = _parts(payload, LENGTH.size, (length, max(0, len(payload) - LENGTH.size - length)))
            self._source = PaintSource(image, mask)
            return ()
        values = json.loads(payload)
        if kind == Kind.PAINT:
            params = ImageParams.from_json(json.dumps(values.pop("params")))
            source = self._source_of(values.pop("source"))
            return [PaintRequest(**values, params=params, source=source)]
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

    def _source_of(self, there: bool) -> PaintSource | None:
        if there and self._source is None:
            raise ValueError("the source has not come")
        return self._source if there else None

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
            if at < first:
                raise ValueError(f"{at - first} tokens")
            logprobs = waiting.pop(row_id, ()) if waiting else ()
            events.append(TokensEvent(row_id, values[first:at], logprobs))
        return events
