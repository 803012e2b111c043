"""The supervisor's control socket: any process of the same user asks one JSON line and gets one JSON line."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MAX_LINE = 1 << 16

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class ControlSocket:
    """Listens in the deployment's folder, inside the supervisor's loop; nothing here blocks.

    Args:
        path: of the socket; its folder keeps other users out.
        selector: the loop's; its data is the function to call.
        answer: gives the reply to a question; a `ValueError`, `TypeError` or `OSError` of it goes back as "error".
    """

    def __init__(self, path: Path, selector: selectors.BaseSelector, answer: Answer) -> None:
        self._selector = selector
        self._answer = answer
        self._received: dict[socket.socket, bytes] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(16)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._received[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(connection))

    def _read(self, connection: socket.socket) -> None:
        try:
            piece = connection.recv(_MAX_LINE)
        except OSError:
            piece = b""
        text = self._received[connection] + piece
        self._received[connection] = text
        if b"\n" in text:
            with contextlib.suppress(OSError):  # an asker that left; a reply fits the socket's buffer
                connection.send(json.dumps(self._reply(text.partition(b"\n")[0])).encode() + b"\n")
        elif piece and len(text) < _MAX_LINE:
            return
        self._drop(connection)

    def _reply(self, line: bytes) -> dict[str, Any]:
        try:
            return self._answer(json.loads(line))
        except (ValueError, TypeError, AttributeError, OSError) as error:
            return {"error": str(error)}

    def _drop(self, connection: socket.socket) -> None:
        del self._received[connection]
        self._selector.unregister(connection)
        connection.close()

    def close(self) -> None:
        """Stop listening and drop open questions."""
        for connection in list(self._received):
            self._drop(connection)
        self._selector.unregister(self._listener)
        self._listener.close()
