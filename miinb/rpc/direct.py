"""Predict without gRPC, for clients on the frontend's machine: calls one after another on a connection of their own.

A short text takes an encoder less than half a millisecond; gRPC's way there and back takes twice that. The messages
are the same bytes as gRPC's (`codec.py`). A request is a frame `u32 length | f64 time limit in seconds | payload`, an
answer `u32 length | u8 whether it failed | payload`, little-endian. Whoever closes the connection ends the call.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from pathlib import Path

from miinb.errors import Cancelled
from miinb.rpc import codec, failures

REQUEST = struct.Struct("<Id")
ANSWER = struct.Struct("<IB")
#: What is asked of the socket at once, at least and at most.
RECEIVE_BYTES = 1 << 14
LARGE_BYTES = 1 << 20
#: Connections that wait for their next call; more are closed after theirs.
MAX_IDLE = 64


def socket_beside(rpc_socket: Path) -> Path:
    """The socket of direct calls: in the folder of gRPC's."""
    return rpc_socket.with_name("predict.sock")


class DirectCall:
    """One call: it is sent when `result` is asked for. `cancel` may come from any thread."""

    def __init__(
        self, connections: Connections, sock: socket.socket, data: bytes, timeout_s: float, spin_s: float
    ) -> None:
        self._connections = connections
        self._socket = sock
        self._data = data
        self._end = time.monotonic() + timeout_s
        self._spin_s = spin_s
        self._cancelled = False

    def cancel(self) -> None:
        """End the call; who waits for its result gets Cancelled."""
        self._cancelled = True
        self._connections.end(self, self._socket)

    def result(self) -> bytes:
        """The answer's bytes.

        Raises:
            MiinbError: what the server says; DeadlineExceeded, Cancelled, or Unavailable where it does not answer.
        """
        try:
            failed, payload = self._exchange()
        except TimeoutError:
            self._connections.drop(self, self._socket)
            raise failures.timed_out() from None
        except OSError:
            self._connections.drop(self, self._socket)
            if self._cancelled:
                raise Cancelled("The request was canceled.") from None
            raise failures.unavailable() from None
        except BaseException:  # the Stop button, say
            self._connections.drop(self, self._socket)
            raise
        self._connections.keep(self, self._socket)
        if failed:
            raise failures.decode_failure(payload)
        return payload

    def _exchange(self) -> tuple[bool, bytes]:
        begin, left_s = time.monotonic(), self._left_s()
        self._socket.settimeout(left_s)
        self._socket.sendall(REQUEST.pack(len(self._data), left_s) + self._data)
        self._connections.look(self._socket, self._spin_s)
        received = self._receive(ANSWER.size)
        length, failed = ANSWER.unpack_from(received)
        self._connections.quick = time.monotonic() - begin < 2 * self._spin_s
        missing = ANSWER.size + length - len(received)
        if missing < 0:  # not a server of this kind
            raise ConnectionResetError
        return bool(failed), received[ANSWER.size :] + (self._receive(missing) if missing else b"")

    def _left_s(self) -> float:
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    def _receive(self, size: int) -> bytes:
        """So many bytes, and more if they are there: the answer's. Raises OSError where the connection ends before."""
        parts: list[bytes] = []
        while size > 0:
            if parts:
                self._socket.settimeout(self._left_s())
            data = self._socket.recv(min(max(size, RECEIVE_BYTES), LARGE_BYTES))
            if not data:
                raise ConnectionResetError
            parts.append(data)
            size -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)


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

    def call(self, data: bytes, timeout_s: float, *, spin_s: float = 0.0) -> DirectCall | None:
        """A call with these bytes; None: nobody listens there.

        Args:
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
            call = DirectCall(self, sock, data, timeout_s, spin_s)
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
