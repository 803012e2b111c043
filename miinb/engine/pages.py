"""The pages of the KV cache: who holds which, and which hold a prefix that another prompt may reuse. No torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

#: The entry before the first page of every prompt.
ROOT = 0


class PagePool:
    """Hands out pages, counts their holders, and remembers what finished prompts left in them.

    A full page can be registered under (entry of the page before it, its tokens). Entries are found by these exact
    tokens, so two different prefixes never meet, whatever a hash would say. Registered pages without a holder are kept
    until the memory is needed, the one unused for longest going first.

    Attributes:
        pages: number of pages.
        page_tokens: tokens in a page.
        prefix_cache: False: nothing is registered (where a page is a whole slot no prompt fills it: see `slots.py`).
    """

    def __init__(self, pages: int, page_tokens: int, *, prefix_cache: bool) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self.prefix_cache = prefix_cache
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered, without a holder; oldest first
        self._entries: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (parent, tokens): (entry, page)
        self._key_of_page: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._last_entry = ROOT

    @property
    def free(self) -> int:
        """Pages that `allocate` can hand out now (idle registered ones included)."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.pages - self.free

    def pages_for(self, tokens: int) -> int:
        """How many pages so many tokens need."""
        return -(-tokens // self.page_tokens)

    @property
    def blank(self) -> Sequence[int]:
        """Free pages that are not registered."""
        return self._free

    def allocate(self, page: int | None = None) -> int:
        """A page for one holder (this blank one, if given); the caller has looked at `free`."""
        if page is not None:
            self._free.remove(page)
        elif self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._entries[self._key_of_page.pop(page)]
        self._holders[page] = 1
        return page

    def release(self, page: int) -> bool:
        """One holder less. True if the page is now blank memory (unregistered and without a holder)."""
        self._holders[page] -= 1
        if self._holders[page] > 0:
            return False
        if page in self._key_of_page:
            self._idle[page] = None
            return False
        self._free.append(page)
        return True

    def match(self, token_ids: Sequence[int], limit: int) -> tuple[list[int], int]:
        """The registered pages that hold the start of `token_ids`, at most `limit` tokens; nothing is held yet.

        Returns:
            The pages, and the entry of the last one (`ROOT` if there is none).
        """
        found: list[int] = []
        entry = ROOT
        if not self.prefix_cache:
            return found, entry
        size = self.page_tokens
        for start in range(0, limit - size + 1, size):
            hit = self._entries.get((entry, tuple(token_ids[start : start + size])))
            if hit is None:
                break
            entry, page = hit
            found.append(page)
        return found, entry

    def idle(self, pages: Sequence[int]) -> int:
        """How many of these pages `free` counts."""
        return sum(page in self._idle for page in pages)

    def hold(self, pages: Sequence[int]) -> None:
        """One holder more for each of these pages (found by `match`)."""
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)

    def register(self, parent: int, tokens: Sequence[int], page: int) -> int:
        """Remember that a full, held page holds these tokens after the entry `parent`.

        Returns:
            The entry; if another page already holds the same prefix it is that one's, and this page stays private.
        """
        key = (parent, tuple(tokens))
        known = self._entries.get(key)
        if known is not None:
            return known[0]
        self._last_entry += 1
        self._entries[key] = (self._last_entry, page)
        self._key_of_page[page] = key
        return self._last_entry

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Compare the books with what the holders say they hold (for tests and debugging).

        Raises:
            RuntimeError: a page is lost, held twice by one row, or counted wrongly.
        """
        counts = [0] * self.pages
        for pages in held:
            if len(set(pages)) != len(pages):
                raise RuntimeError(f"a row holds a page twice: {list(pages)}")
            for page in pages:
                counts[page] += 1
        if counts != self._holders:
            raise RuntimeError(f"holders are {self._holders}, but rows hold {counts}")
        blank = set(self._free)
        idle = set(self._idle)
        unheld = {page for page in range(self.pages) if not counts[page]}
        if len(blank) != len(self._free) or blank & idle or blank | idle != unheld:
            raise RuntimeError(f"free {sorted(blank)} and idle {sorted(idle)} are not the unheld {sorted(unheld)}")
        if {page for _, page in self._entries.values()} != set(self._key_of_page):
            raise RuntimeError("the prefix entries and their pages differ")
