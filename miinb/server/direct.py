"""The frontend's end of direct predict calls; `miinb.rpc.direct` says what goes over the socket, and why."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

from miinb.errors import InvalidRequest, QueueFull
from miinb.rpc import codec, failures
from miinb.rpc.direct import ANSWER, REQUEST
from miinb.server.ipc import listen

log = logging.getLogger(__name__)

#: In which the next call of a list comes, once those before it have ended.
BETWEEN_CALLS_S = 0.1


class DirectServer:
    """Answers predict requests on a unix socket.

    Args:
        predict: answers one: (bytes of the request, seconds that it may take) to bytes.
        most: calls at the same time; those above it are refused.
    """

    def __init__(self, predict: Callable[[bytes, float], Awaitable[bytes]], most: int) -> None:
        self._predict = predict
        self._most = most
        self._listener: asyncio.Server | None = None  # held here: uvloop ends what nobody holds
        self._connections: set[_Connection] = set()
        self._calls: dict[asyncio.Task[None], bytes] = {}
        self._stopping = False
        self._running: set[str] = set()  # requests that run while it stops: their further calls are let in

    async def start(self, path: Path) -> None:
        """Listen there."""
        self._listener = await listen(path, self._connection)

    async def stop(self, drain_s: float) -> None:
        """Refuse new requests, wait for all calls of the running ones, and end those that are left."""
        self._stopping = True
        if self._listener is not None:
            self._listener.close()
        self._running = set(map(_request_id, self._calls.values())) - {""}
        end = asyncio.get_running_loop().time() + drain_s
        while self._calls and (left_s := end - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(self._calls, timeout=left_s)
            await asyncio.sleep(min(BETWEEN_CALLS_S, left_s))
        for call in tuple(self._calls):
            call.cancel()
        if self._calls:
            await asyncio.wait(self._calls)
        for connection in tuple(self._connections):
            connection.close()

    def _connection(self) -> _Connection:
        connection = _Connection(self._begin, self._connections)
        self._connections.add(connection)
        return connection

    def _begin(self, data: bytes, left_s: float, answer: Callable[[bytes], None]) -> asyncio.Task[None]:
        call = asyncio.ensure_future(self._answered(data, left_s, answer))
        self._calls[call] = data
        call.add_done_callback(self._calls.pop)
        return call

    async def _answered(self, data: bytes, left_s: float, answer: Callable[[bytes], None]) -> None:
        try:
            if self._stopping and _request_id(data) not in self._running:
                raise failures.draining()
            if len(self._calls) > self._most:
                raise QueueFull(f"{self._most} requests run or wait already.", hint="Try again later.")
            found = _frame(await self._predict(data, left_s))
        except asyncio.CancelledError:
            if not self._stopping:
                raise  # the client has left
            answer(_frame(failures.encode_failure(failures.stopped()), failed=True))
        except Exception as error:
            answer(_frame(failures.encode_failure(error, _log), failed=True))
        else:
            answer(found)


def _request_id(data: bytes) -> str:
    try:
        return codec.request_id(data)
    except InvalidRequest:
        return ""


def _frame(payload: bytes, *, failed: bool = False) -> bytes:
    return ANSWER.pack(len(payload), failed) + payload


def _log(number: str, cause: BaseException) -> None:
    log.error("error %s", number, exc_info=cause)


class _Connection(asyncio.Protocol):
    """A client's connection. It has one call at a time; who sends more, or too much, is not a client of ours."""

    def __init__(
        self,
        begin: Callable[[bytes, float, Callable[[bytes], None]], asyncio.Task[None]],
        connections: set[_Connection],
    ) -> None:
        self._begin = begin
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._call: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # a stream socket's; uvloop's own class is none
        self._transport.set_write_buffer_limits(0)

    def pause_writing(self) -> None:
        """Called by asyncio: the client has not read its answer, so it gets no other one."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Called by asyncio: the client has read its answer."""
        if self._transport is not None:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        if self._call is not None:
            self.close()
            return
        received = self._received
        received += data
        if len(received) < REQUEST.size:
            return
        length, left_s = REQUEST.unpack_from(received)
        end = REQUEST.size + length
        if length > codec.MAX_REQUEST_BYTES or len(received) > end:
            self.close()
        elif len(received) == end:
            self._received = bytearray()
            self._call = self._begin(bytes(memoryview(received)[REQUEST.size :]), left_s, self._answer)

    def _answer(self, data: bytes) -> None:
        self._call = None
        if self._transport is not None:
            self._transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._transport = None
        self._connections.discard(self)
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        """Close the connection once what was written has gone."""
        if self._transport is not None:
            self._transport.close()
