"""The wires between rank 0 and the followers of its replica: unix sockets, one a follower.

What a step is goes down, readiness and failures come up. A peer's death is the end of its stream, known at once. A
message takes 10 us one way; as plans are launched ahead of the device nobody waits for it.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miinb.engine.parallel import COLLECTIVE_S, PeerLost

_HEAD = struct.Struct("<I")
#: Longest line of JSON that comes up.
_MOST = 1 << 16


class Leader:
    """Rank 0's ends.

    Args:
        path: of the socket, in the deployment's private folder.
        followers: how many will connect.
    """

    def __init__(self, path: Path, followers: int) -> None:
        path.unlink(missing_ok=True)
        self._followers: list[socket.socket] = []
        self._heard: list[bytes] = [b""] * followers
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(followers)
            for _ in range(followers):  # the supervisor's time limit holds, and it ends all ranks when one dies
                self._followers.append(listener.accept()[0])
        self._poll = select.poll()
        for follower in self._followers:
            self._poll.register(follower, select.POLLIN)

    def send(self, data: bytes) -> None:
        """One message to every follower.

        Raises:
            PeerLost: one is gone, or has read nothing for a minute.
        """
        message = _HEAD.pack(len(data)) + data
        for follower in self._followers:
            follower.settimeout(COLLECTIVE_S)
            try:
                follower.sendall(message)
            except OSError as error:
                raise PeerLost(f"A follower is gone: {error}") from error

    def gather(self) -> list[dict[str, Any]]:
        """Wait for one JSON object from every follower (at start-up). Raises PeerLost."""
        found = []
        for place, follower in enumerate(self._followers):
            follower.settimeout(None)
            while b"\n" not in self._heard[place]:
                self._hear(place)
            line, _, self._heard[place] = self._heard[place].partition(b"\n")
            found.append(json.loads(line))
        return found

    def news(self) -> list[dict[str, Any]]:
        """The JSON objects that have come up since the last call; waits for nothing. Raises PeerLost."""
        found: list[dict[str, Any]] = []
        ready = {number for number, _ in self._poll.poll(0)}
        for place, follower in enumerate(self._followers):
            if follower.fileno() in ready:
                self._hear(place)
                *lines, self._heard[place] = self._heard[place].split(b"\n")
                found += [json.loads(line) for line in lines]
        return found

    def _hear(self, place: int) -> None:
        try:
            data = self._followers[place].recv(_MOST)
        except OSError as error:
            raise PeerLost(f"A follower is gone: {error}") from error
        if not data:
            raise PeerLost("A follower is gone: it closed its socket.")
        self._heard[place] += data

    def close(self) -> None:
        """The followers end, too."""
        for follower in self._followers:
            follower.close()


class Link:
    """A follower's end.

    Args:
        path: of rank 0's socket; waited for, as rank 0 may be slower.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                self._socket.connect(str(path))
                return
            time.sleep(0.01)

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """The next message; None: rank 0 has ended. Raises TimeoutError."""
        self._socket.settimeout(timeout_s)
        head = self._read(_HEAD.size)
        return self._read(_HEAD.unpack(head)[0]) if head else None

    def check(self) -> None:
        """Raise PeerLost if rank 0 has ended."""
        with contextlib.suppress(BlockingIOError):
            if not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                raise PeerLost("Rank 0 ended.")

    def _read(self, count: int) -> bytes | None:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            try:
                got = self._socket.recv_into(view)
            except ConnectionError:
                return None
            if not got:
                return None
            view = view[got:]
        return bytes(data)

    def tell(self, words: Mapping[str, Any]) -> None:
        """One JSON object to rank 0. Raises PeerLost."""
        try:
            self._socket.sendall(json.dumps(words).encode() + b"\n")
        except OSError as error:
            raise PeerLost(f"Rank 0 is gone: {error}") from error

    def close(self) -> None:
        """Rank 0 learns that this rank has ended."""
        self._socket.close()
