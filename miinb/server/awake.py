"""Keeps the frontend's loop from sleeping while its next event is near; `miinb.spinning` says why."""

from __future__ import annotations

import asyncio
import time


class Awake:
    """Of the running loop."""

    def __init__(self) -> None:
        self._until = 0.0
        self._looking = False

    def for_the_next(self, seconds: float) -> None:
        """Let the loop look for events again and again for so long, from now on."""
        if not seconds:
            return
        self._until = time.monotonic() + seconds
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """A loop that has a callback to run looks for events and does not wait for them."""
        self._looking = time.monotonic() < self._until
        if self._looking:
            asyncio.get_running_loop().call_soon(self._look)
