"""Calls without gRPC, for clients on the frontend's machine: one after another on a connection of their own.

A short text takes an encoder less than half a millisecond, and a picture's file can cross in as much; gRPC's way takes
several times that. The messages are those of gRPC (`codec.py`, `image_codec.py`). A request is a frame
`u32 length | f64 time limit in seconds | u8 method | payload`, its answer one or several of `u32 length | u32 length
of the tail | u8 kind | message | tail`, little-endian, of which the last is of kind LAST or FAILED. A tail is a file
that belongs to its message and is large: so nobody needs to copy it. Whoever closes the connection ends the call.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from enum import IntEnum
from pathlib import Path
from typing import Self

from miinb.errors import Cancelled
from miinb.rpc import codec, failures

REQUEST = struct.Struct("<IdB")
ANSWER = struct.Struct("<IIB")
#: What is asked of the socket at once, at least and at most.
RECEIVE_BYTES = 1 << 14
LARGE_BYTES = 1 << 20
#: Connections that wait for their next call; more are closed after theirs.
MAX_IDLE = 64


class Method(IntEnum):
    """What is asked for, by its byte on the wire."""

    PREDICT = 0
    IMAGES = 1


class Kind(IntEnum):
    """The kinds of an answer's messages, by their byte on the wire; a failure is what `failures` makes of an error."""

    LAST = 0
    FAILED = 1
    MORE = 2


def socket_beside(rpc_socket: Path) -> Path:
    """The socket of direct calls: in the folder of gRPC's."""
    return rpc_socket.with_name("direct.sock")


class DirectCall:
    """One call: an iterator of its answer's messages, sent when the first is asked for.

    `cancel` may come from any thread. Who does not read to the end must `close` it.
    """

    def __init__(
        self,
        connections: Connections,
        sock: socket.socket,
        method: Method,
        data: bytes,
        timeout_s: float,
        spin_s: float,
    ) -> None:
        self._connections = connections
        self._socket = sock
        self._method = method
        self._data: bytes | None = data  # None: it has been sent
        self._end = time.monotonic() + timeout_s
        self._spin_s = spin_s
        self._received = b""  # of the next message
        self._cancelled = False
        self._ended = False

    def cancel(self) -> None:
        """End the call; who waits for its messages gets Cancelled."""
        self._cancelled = True
        self._connections.end(self, self._socket)

    def close(self) -> None:
        """Nobody reads it any more: a call that still runs ends."""
        if not self._ended:
            self._ended = True
            self._connections.drop(self, self._socket)

    def result(self) -> bytes:
        """The message of an answer that has one, without a tail; raises as `__next__`."""
        message, _ = next(self)
        self.close()  # of a server that would say more
        return message

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[bytes, bytes]:
        """The next message's bytes, and its tail.

        Raises:
            MiinbError: what the server says; DeadlineExceeded, Cancelled, or Unavailable where it does not answer.
        """
        if self._ended:
            raise StopIteration
        try:
            kind, message, tail = self._message()
        except TimeoutError:
            self.close()
            raise failures.timed_out() from None
        except OSError:
            self.close()
            if self._cancelled:
                raise Cancelled("The request was canceled.") from None
            raise failures.unavailable() from None
        except BaseException:  # the Stop button, say
            self.close()
            raise
        if kind != Kind.MORE:
            self._ended = True
            self._connections.keep(self, self._socket)
        if kind == Kind.FAILED:
            raise failures.decode_failure(message)
        return message, tail

    def _message(self) -> tuple[int, bytes, bytes]:
        if self._data is not None:
            self._send(self._data)
        length, tail, kind = ANSWER.unpack(self._take(ANSWER.size))
        found = kind, self._take(length), self._take(tail)
        if kind not in _KINDS or (kind != Kind.MORE and self._received):  # not a server of this kind
            raise ConnectionResetError
        return found

    def _send(self, data: bytes) -> None:
        begin, left_s = time.monotonic(), self._left_s()
        self._socket.settimeout(left_s)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # why it was closed may be there to read
            self._socket.sendall(REQUEST.pack(len(data), left_s, self._method) + data)
        self._data = None
        if self._spin_s:
            self._connections.look(self._socket, self._spin_s)
            self._received = self._receive(RECEIVE_BYTES)
            self._connections.quick = time.monotonic() - begin < 2 * self._spin_s

    def _take(self, size: int) -> bytes:
        """So many bytes; of what comes behind them a little may be received too."""
        parts, missing = [self._received[:size]], size - len(self._received)
        self._received = self._received[size:]
        while missing > 0:
            data = self._receive(min(max(missing, RECEIVE_BYTES), LARGE_BYTES))
            parts.append(data[:missing])
            self._received = data[missing:]
            missing -= len(data)
        return b"".join(parts)

    def _left_s(self) -> float:
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    def _receive(self, most: int) -> bytes:
        """What has come, or comes first. Raises OSError where the connection ends or the time is up."""
        self._socket.settimeout(self._left_s())
        data = self._socket.recv(most)
        if not data:
            raise ConnectionResetError
        return data


_KINDS = frozenset(Kind)


class Connections:
    """The connections of a client to one frontend. Thread-safe; a forked child makes its own.

    Args:
        path: the frontend's socket; None: it is on another machine, or behind TCP.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = None if path is None else str(path)
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._calls: set[DirectCall] = set()
        self._owner = os.getpid()
        self._looking = threading.Lock()
        self.quick = True  # the last answer

    def call(self, method: Method, data: bytes, timeout_s: float, *, spin_s: float = 0.0) -> DirectCall | None:
        """A call with these bytes; None: nobody listens there.

        Args:
            method: what is asked for.
            data: of the request.
            timeout_s: limit of the call.
            spin_s: for so long it may look for its answer before it sleeps.

        Raises:
            InvalidRequest: it is larger than the server takes.
        """
        if self._path is None:
            return None
        if len(data) > codec.MAX_REQUEST_BYTES:
            raise failures.too_large()
        with self._lock:
            self._forget_the_parents()
            sock = self._take(timeout_s)
            if sock is None:
                return None
            call = DirectCall(self, sock, method, data, timeout_s, spin_s)
            self._calls.add(call)
            return call

    def _forget_the_parents(self) -> None:
        """What a fork has copied: to shut down a socket of the parent's would end its call."""
        if self._owner != os.getpid():
            self._owner, self._idle, self._calls = os.getpid(), [], set()

    def _take(self, timeout_s: float) -> socket.socket | None:
        while self._idle:
            sock = self._idle.pop()
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            if not poll.poll(0):
                return sock
            sock.close()  # its frontend is gone
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)  # and not blocking: where too many wait to be let in, this raises
        try:
            sock.connect(str(self._path))
        except OSError:
            sock.close()
            return None
        return sock

    def look(self, sock: socket.socket, seconds: float) -> None:
        """Look for an answer for so long; of several threads one does, and the others sleep at once."""
        if not (seconds and self.quick and self._looking.acquire(blocking=False)):
            return
        try:
            poll, end = select.poll(), time.monotonic() + seconds
            poll.register(sock, select.POLLIN)
            while not poll.poll(0) and time.monotonic() < end:
                pass
        finally:
            self._looking.release()

    def keep(self, call: DirectCall, sock: socket.socket) -> None:
        """A call has ended well: its connection waits for the next one."""
        with self._lock:
            if call in self._calls and len(self._idle) < MAX_IDLE:
                self._calls.remove(call)
                self._idle.append(sock)
                return
        self.drop(call, sock)

    def drop(self, call: DirectCall, sock: socket.socket) -> None:
        """A call has ended otherwise: so does its connection, and with it the call on the server's side."""
        with self._lock:
            self._calls.discard(call)
        sock.close()

    def end(self, call: DirectCall, sock: socket.socket) -> None:
        """Wake up who waits for a call that still runs: its connection may be another's by now."""
        with self._lock, contextlib.suppress(OSError):
            if call in self._calls:
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connections that wait, and cancel the calls that run."""
        with self._lock:
            self._forget_the_parents()
            idle, self._idle = self._idle, []
            calls = tuple(self._calls)
        for sock in idle:
            sock.close()
        for call in calls:
            call.cancel()
