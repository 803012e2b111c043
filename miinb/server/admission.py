"""Which calls a frontend lets in: all, and while it drains the further calls of requests that have begun."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from miinb.errors import MiinbError
from miinb.rpc import failures


class Admission:
    """The calls that run, by the ids of their requests; a list's calls have the same."""

    def __init__(self) -> None:
        self._running: dict[object, Callable[[], str]] = {}
        self._let_in: frozenset[str] | None = None  # while it drains
        self._ended = -math.inf

    @property
    def rest_s(self) -> float:
        """Seconds since the last call ended; 0 while one runs."""
        return 0.0 if self._running else time.monotonic() - self._ended

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._let_in = frozenset(map(_read, self._running.values())) - {""}

    @contextlib.contextmanager
    def call(self, request_id: Callable[[], str]) -> Iterator[None]:
        """The time in which a call runs.

        Args:
            request_id: reads its request's id, which is asked for where it matters alone.

        Raises:
            Unavailable: it is a new request's, which is not let in any more.
        """
        if self._let_in is not None and _read(request_id) not in self._let_in:
            raise failures.draining()
        key = object()
        self._running[key] = request_id
        try:
            yield
        finally:
            del self._running[key]
            self._ended = time.monotonic()


def _read(request_id: Callable[[], str]) -> str:
    try:
        return request_id()
    except MiinbError:  # its bytes are no request
        return ""
