"""The frontend's end of direct calls; `miinb.rpc.direct` says what goes over the socket, and why."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Protocol, cast

from pydantic import Field

from miinb.errors import DeadlineExceeded, InvalidRequest, MiinbError, QueueFull
from miinb.frozen import Frozen
from miinb.rpc import codec, failures
from miinb.rpc.direct import ANSWER, REQUEST, Kind
from miinb.server.ipc import SEND_BYTES, listen

log = logging.getLogger(__name__)

#: A request of which something has come is whole within so long, or its connection is closed.
MAX_UNSENT_S = 30.0
#: An answer that its client does not read for so long is dropped.
MAX_UNREAD_S = 60.0
#: For clients to read why their calls have ended with the server.
LAST_WORDS_S = 1.0


class Send(Protocol):
    """Sends a message of an answer that is not its last, and its tail, when the client has read those before it."""

    def __call__(self, message: bytes, tail: bytes = b"", /) -> Awaitable[None]:
        """Raises nothing: a client that leaves ends the call."""


#: Answers a request: (its bytes, seconds that it may take, `Send`) to the bytes of the last message.
Serve = Callable[[bytes, float, Send], Awaitable[bytes]]


class Head(Frozen):
    """What a request says before its bytes, besides their number.

    Attributes:
        timeout_s: seconds that it may take.
    """

    timeout_s: Annotated[float, Field(gt=0)]


class DirectServer:
    """Answers requests on a unix socket.

    Args:
        methods: what answers requests of each `Method`.
        most: calls at the same time; those above it are refused.
        most_connections: at the same time. One more takes the place of the one that has been idle longest, and is
            refused where none is; who is closed is told `QueueFull`.
    """

    def __init__(self, methods: Mapping[int, Serve], most: int, most_connections: int = 1024) -> None:
        self._methods = methods
        self._most = most
        self._most_connections = most_connections
        self._listener: asyncio.Server | None = None  # held here: uvloop ends what nobody holds
        self._connections: set[_Connection] = set()
        self._idle: dict[_Connection, None] = {}  # of them, those that have no call; idle longest first
        self._calls: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def start(self, path: Path) -> None:
        """Listen there."""
        self._listener = await listen(path, self._connection)

    @property
    def busy(self) -> bool:
        """Whether a call runs, or its answer is being read."""
        return bool(self._calls)

    async def stop(self) -> None:
        """End the calls that run, tell their clients so, and close the connections."""
        self._stopping = True
        if self._listener is not None:
            self._listener.close()
        for call in tuple(self._calls):
            call.cancel()
        if self._calls:
            await asyncio.wait(self._calls, timeout=LAST_WORDS_S)
        for connection in tuple(self._connections):
            connection.close()

    def _connection(self) -> _Connection:
        return _Connection(self)

    def _made(self, connection: _Connection) -> None:
        """A client has come."""
        if len(self._connections) >= self._most_connections:
            connection, new = next(iter(self._idle), connection), connection
            words = f"{self._most_connections} connections are open already."
            connection.refuse(QueueFull(words, hint="Try again later, or close clients that are not needed."))
            if connection is new:
                return
            self._lost(connection)
            connection = new
        self._connections.add(connection)
        self._idles(connection)

    def _idles(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._idle[connection] = None

    def _lost(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._idle.pop(connection, None)

    def _begin(self, connection: _Connection, method: int, left_s: float, data: bytes) -> asyncio.Task[None]:
        call = asyncio.ensure_future(self._answered(connection, method, left_s, data))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    async def _answered(self, connection: _Connection, method: int, left_s: float, data: bytes) -> None:
        try:
            if len(self._calls) > self._most:
                raise QueueFull(f"{self._most} requests run or wait already.", hint="Try again later.")
            if method not in self._methods:
                raise failures.unknown_call()
            left_s = Head.parse({"timeout_s": left_s}, error=InvalidRequest).timeout_s
            kind, found = Kind.LAST, await self._methods[method](data, left_s, connection.send)
        except asyncio.CancelledError:
            if not self._stopping:
                raise  # the client has left
            kind, found = Kind.FAILED, failures.encode_failure(failures.stopped())
        except Exception as error:
            kind, found = Kind.FAILED, failures.encode_failure(error, _log)
        await connection.end(kind, found)


def _log(number: str, cause: BaseException) -> None:
    log.error("error %s", number, exc_info=cause)


class _Connection(asyncio.Protocol):
    """A client's connection. It has one call at a time; who sends more, or too much, is not a client of ours."""

    def __init__(self, server: DirectServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._late: asyncio.TimerHandle | None = None  # while a part of a request has come
        self._call: asyncio.Task[None] | None = None
        self._taken = asyncio.Event()  # what was written has gone
        self._taken.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # a stream socket's; uvloop's own class is none
        self._transport.set_write_buffer_limits(0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        self._server._made(self)

    def pause_writing(self) -> None:
        """Called by asyncio: the client has not read what was written."""
        self._taken.clear()

    def resume_writing(self) -> None:
        """Called by asyncio: the client has read it."""
        self._taken.set()
        if self._transport is not None:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        if self._call is not None:
            self._abort()
            return
        received = self._received
        received += data
        length = end = 0
        if len(received) >= REQUEST.size:
            length, left_s, method = REQUEST.unpack_from(received)
            end = REQUEST.size + length
        if length > codec.MAX_REQUEST_BYTES:
            self.refuse(failures.too_large())
        elif not end or len(received) < end:
            self._wait()
        elif len(received) > end:
            self.close()
        else:
            self._received = bytearray()
            self._no_more_wait()
            self._server._idle.pop(self, None)
            self._call = self._server._begin(self, method, left_s, bytes(memoryview(received)[REQUEST.size :]))

    def _wait(self) -> None:
        """A part of a request has come; one that comes in one piece needs no timer."""
        if self._late is None:
            self._server._idle.pop(self, None)
            words = f"The request did not come whole within {MAX_UNSENT_S:g} s."
            error = DeadlineExceeded(words, hint="Send it in one piece.")
            self._late = asyncio.get_running_loop().call_later(MAX_UNSENT_S, self.refuse, error)

    def _no_more_wait(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def refuse(self, error: MiinbError) -> None:
        """Say why, and close the connection."""
        self._write(Kind.FAILED, failures.encode_failure(error))
        self.close()

    async def send(self, message: bytes, tail: bytes = b"", /) -> None:
        """Write one of several messages when the client has read those before it, so that no more than one waits."""
        await self._taken.wait()
        self._write(Kind.MORE, message, tail)

    async def end(self, kind: Kind, message: bytes) -> None:
        """Write the last message; who does not read is let go."""
        self._call = None
        self._write(kind, message)
        if not self._taken.is_set() and self._transport is not None:
            self._transport.pause_reading()  # until then there is no other request
            try:
                async with asyncio.timeout(MAX_UNREAD_S):
                    await self._taken.wait()
            except TimeoutError:
                self._abort()
                return
        if self._call is None and self._late is None:  # else the next one has come
            self._server._idles(self)

    def _write(self, kind: Kind, message: bytes, tail: bytes = b"") -> None:
        if self._transport is None:
            return
        data = ANSWER.pack(len(message), len(tail), kind) + message
        if tail:
            self._transport.writelines((data, tail))
        else:
            self._transport.write(data)

    def _abort(self) -> None:
        """Close the connection; what was written and not read is lost."""
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._transport = None
        self._taken.set()
        self._server._lost(self)
        self._no_more_wait()
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        """Close the connection once what was written has gone."""
        self._no_more_wait()
        if self._transport is not None:
            self._transport.close()
