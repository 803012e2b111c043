"""The socket between the frontend and rank 0 of a replica: unix, stream, in `frames`.

Rank 0 uses `RankSocket` (synchronous, never blocks in a send), the frontend `RankChannel` (asyncio).
"""

from __future__ import annotations

import asyncio
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from miinb.image_messages import PaintRequest, PaintSource
from miinb.messages import TokensEvent
from miinb.server.frames import Decoder, Message, ToFrontend, ToRank, encode, pieces_of, tokens_frame

MAX_OUTBOX_BYTES = 64 << 20
SEND_BYTES = 1 << 20  # that the kernel may hold: a picture's pixels go in one call (where it lets so many)
#: Clients that may wait to be let in, while the loop is busy; a further one is refused by the kernel.
BACKLOG = 1024


class RankSocket:
    """Rank 0's end: synchronous, and a send never blocks.

    Messages wait in a bounded outbox when the socket is full; TOKENS frames that wait next to each other become one.
    """

    def __init__(self, sock: socket.socket, *, max_outbox_bytes: int = MAX_OUTBOX_BYTES) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        sock.setblocking(False)
        self._socket = sock
        self._decoder = Decoder()
        #: Frames or their pieces, and tokens not yet packed.
        self._outbox: deque[bytes | memoryview | dict[int, list[int]]] = deque()
        self._sending = memoryview(b"")  # what is partly on its way
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
                for piece in pieces_of(message):
                    self._append(piece)
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

    def _append(self, data: bytes | memoryview) -> None:
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
                self._sending = memoryview(tokens_frame(head) if isinstance(head, dict) else head)
                self._waiting_bytes -= 4 * sum(map(len, head.values())) if isinstance(head, dict) else len(head)
            try:
                self._sending = self._sending[self._socket.send(self._sending) :]
            except BlockingIOError:
                return False
        return True

    def receive(self, timeout_s: float | None = 0.0, *, spin_s: float = 0.0) -> list[ToRank]:
        """Everything that has arrived, flushing the outbox meanwhile.

        Args:
            timeout_s: how long to wait for a first message; 0 does not wait, None waits for ever.
            spin_s: for how much of that to look again and again instead of sleeping, which takes long to wake up from.

        Raises:
            ConnectionError: the frontend is gone.
        """
        if timeout_s == 0.0:  # within steps: one system call
            self.flush()
            return self._drain()  # type: ignore[return-value]  # the frontend sends only these kinds
        begin = time.monotonic()
        end = None if timeout_s is None else begin + timeout_s
        messages: list[Message] = []
        while not messages and time.monotonic() - begin < spin_s and self.flush():
            messages = self._drain()
        while not messages:
            wanted = select.POLLIN if self.flush() else select.POLLIN | select.POLLOUT
            self._poll.modify(self._socket, wanted)
            left = None if end is None else max(0.0, end - time.monotonic())
            ready = self._poll.poll(None if left is None else left * 1000)
            if any(events & ~select.POLLOUT for _, events in ready):
                messages = self._drain()
            elif not ready:
                break
        return messages  # type: ignore[return-value]

    def _drain(self) -> list[Message]:
        messages: list[Message] = []
        while True:
            space = self._decoder.space()
            try:
                count = self._socket.recv_into(space)
            except BlockingIOError:
                return messages
            if not count:
                raise ConnectionError("the frontend is gone")
            messages += self._decoder.filled(count)
            if count < len(space):
                return messages


class RankChannel(asyncio.BufferedProtocol):
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
        self._sent: PaintSource | None = None  # the last one: the next row of the same request has it too
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = transport  # type: ignore[assignment]  # a stream socket's transport is a Transport

    def get_buffer(self, sizehint: int) -> memoryview:
        """Called by asyncio."""
        return self._decoder.space()

    def buffer_updated(self, nbytes: int) -> None:
        """Called by asyncio."""
        try:
            messages = self._decoder.filled(nbytes)
        except ConnectionError:
            self.close()
            return
        self.on_messages(self, messages)  # type: ignore[arg-type]  # a rank sends only these kinds

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._transport = None
        self.on_closed(self)

    def send(self, message: ToRank) -> bool:
        """Queue a message; False when the rank is gone. One that does not read is the supervisor's to end."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        transport.write(encode(message, sent=self._sent))
        if isinstance(message, PaintRequest):
            self._sent = message.source or self._sent
        return True

    @property
    def full(self) -> bool:
        """Whether so much waits to be read that no further request should be sent."""
        return self._transport is not None and self._transport.get_write_buffer_size() > MAX_OUTBOX_BYTES

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()


async def listen(path: Path, make_protocol: Callable[[], asyncio.BaseProtocol]) -> asyncio.Server:
    """Listen on a unix socket that only this user can open, as long as somebody holds the server."""
    path.unlink(missing_ok=True)
    server = await asyncio.get_running_loop().create_unix_server(make_protocol, str(path), backlog=BACKLOG)
    path.chmod(0o600)
    return server
