"""What the slots of a CPU's cache hold, where a page is a whole slot, so that equal beginnings are computed once.

A row that ends leaves its keys and values in its slot. The next prompt goes to the free slot whose tokens it continues;
where that would waste much of them, or the tokens are a running row's, it gets a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

#: Fewest equal tokens that are worth a copy.
LEAST_COPIED = 16


class Place(NamedTuple):
    """Where a prompt goes: `page`, whose first `tokens` tokens are the prompt's once they are copied from `source`."""

    page: int
    source: int
    tokens: int


class SlotMemory:
    """Remembers the tokens of free slots."""

    def __init__(self) -> None:
        self._kept: dict[int, Sequence[int]] = {}  # by page, the one unused for longest first

    def keep(self, page: int, token_ids: Sequence[int]) -> None:
        """A slot is free; the keys and values of these tokens are in it."""
        self._kept[page] = token_ids

    def take(
        self, prompt: Sequence[int], limit: int, free: Sequence[int], running: Iterable[tuple[int, Sequence[int], int]]
    ) -> Place:
        """The best place for a prompt; its page's tokens are forgotten.

        Args:
            prompt: its tokens.
            limit: at most so many of them may be reused.
            free: the free pages, at least one.
            running: the pages that rows hold, the rows' tokens, and how many of these are written.
        """
        unused = next((page for page in reversed(free) if page not in self._kept), -1)
        page = unused if unused >= 0 else next(iter(self._kept))
        place = Place(page, page, 0)
        if unused < 0:  # it would be written over: what is there is better kept by going on from it
            place = Place(page, page, common_prefix(self._kept[page], prompt, limit))
        for source, held in self._kept.items():
            tokens = common_prefix(held, prompt, limit)
            if tokens > place.tokens:
                mostly = 2 * tokens >= len(held)
                place = Place(source if mostly else page, source, tokens)
        for source, held, written in running:
            tokens = common_prefix(held, prompt, min(limit, written))
            if tokens > place.tokens:
                place = Place(page, source, tokens)
        if place.page != place.source and place.tokens < LEAST_COPIED:
            place = Place(page, page, 0)
        self._kept.pop(place.page, None)
        return place


def common_prefix(left: Sequence[int], right: Sequence[int], limit: int) -> int:
    """How many leading tokens are equal, at most `limit`."""
    low, high = 0, min(len(left), len(right), limit)
    if left[:high] == right[:high]:
        return high
    while high - low > 1:  # [:low] is equal, [:high] is not
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
