"""Calls that wait, made awaitable: in threads of their own, and so that Stop reaches them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

MAX_AWAITED = 512  # calls at the same time; the others wait here
LOOK_S = 0.2  # between two looks of a loop at an answer that it waits for

_T = TypeVar("_T")


class Cancelable(Protocol):
    """Requests that belong together."""

    def cancel(self) -> object:
        """End them."""


async def run(work: Callable[[], _T]) -> _T:
    """The result of a call that waits, in a thread of a pool that holds many (the loop's own has six on two cores).

    The loop looks about now and then: a kernel's Stop cancels the task by a signal, which does not wake the loop.
    """
    result = asyncio.get_running_loop().run_in_executor(_pool(), work)
    result.add_done_callback(_seen)
    while not result.done():
        await asyncio.wait((result,), timeout=LOOK_S)
    return result.result()


def _seen(result: asyncio.Future[_T]) -> None:
    """Ask for the error of a call whose task was canceled meanwhile: asyncio would else print it."""
    if not result.cancelled():
        result.exception()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_AWAITED, "miinb-await")


async def in_thread(work: Callable[[], _T], group: Cancelable) -> _T:
    """The same; canceling the task cancels the group."""
    try:
        return await run(work)
    except asyncio.CancelledError:
        group.cancel()
        raise
