"""The memory that rows hold: their pages of the KV cache, and their slots. No torch.

Who gets memory, and from whom it is taken, the scheduler decides; here it is handed out, kept until no step in flight
can write it, and what is left in it offered to those who begin with the same tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from miinb.engine.pages import ROOT, PagePool
from miinb.engine.rows import Row, StepPlan
from miinb.engine.slots import SlotMemory


class RowMemory:
    """Gives rows their pages and slots, and takes them back.

    Args:
        pages, page_tokens: pages of the KV cache, and tokens in a page.
        slots: most rows at once.
        whole: a page is a whole slot: it holds all that a row can ever have.
        prefix_cache: reuse the pages of equal prefixes, or of slots where a page is a whole slot.

    Attributes:
        pool: the pages.
        leaving: rows that need their memory no more, but a step in flight writes it.
    """

    def __init__(self, pages: int, page_tokens: int, slots: int, *, whole: bool, prefix_cache: bool) -> None:
        self.pool = PagePool(pages, page_tokens, prefix_cache=prefix_cache and not whole)
        self.leaving: set[Row] = set()
        self._left = SlotMemory() if prefix_cache and whole else None
        self._all_slots = slots
        self._slots = list(range(slots - 1, -1, -1))
        self._blank: list[int] = []

    @property
    def free_slots(self) -> int:
        """Slots that no row has."""
        return len(self._slots)

    def grow(self, row: Row, tokens: int) -> bool:
        """Let a row have pages for so many tokens. False: there are too few, and it got none."""
        need = self.pool.pages_for(tokens) - len(row.pages)
        if need > self.pool.free:
            return False
        for _ in range(need):
            row.pages.append(self.pool.allocate())
        return True

    def seat(self, row: Row, spare: int, running: Collection[Row], plan: StepPlan, chunks: StepPlan) -> bool:
        """Give a row a slot and pages for all its tokens, if `spare` pages are free besides.

        What it need not compute is then in `row.computed`, and copies that must come before the step in `plan`.

        Args:
            row: the row; there is a free slot.
            spare: pages that must stay free.
            running: the rows that hold memory.
            plan, chunks: the step in the making: what its rows compute is not there yet.
        """
        pool = self.pool
        # The last token is always computed: its logits are wanted.
        reused, entry = pool.match(row.token_ids, row.length - 1)
        need = pool.pages_for(row.length) - len(reused)
        if need + pool.idle(reused) + spare > pool.free:
            return False
        pool.hold(reused)
        row.entry, row.registered = entry, len(reused)
        row.computed = len(reused) * pool.page_tokens
        if self._left is not None:
            self._place(row, running, plan, chunks, self._left)
        else:
            row.pages = reused + [pool.allocate() for _ in range(need)]
        row.slot = self._slots.pop()
        return True

    def _place(self, row: Row, running: Collection[Row], plan: StepPlan, chunks: StepPlan, left: SlotMemory) -> None:
        """Give a row the page that has most of its tokens, or a copy of them."""
        before = {id(row): start for part in (chunks, plan) for row, start in zip(part.rows, part.starts, strict=True)}
        lenders = ((other.pages[0], other.token_ids, before.get(id(other), other.computed)) for other in running)
        page, source, row.computed = left.take(row.token_ids, row.length - 1, self.pool.blank, lenders)
        row.pages = [self.pool.allocate(page)]
        if source != page:
            plan.copies.append((source, page, row.computed))

    def register(self, row: Row, written: int) -> None:
        """Tell the prefix cache of the row's pages that are full, written and proven finite."""
        size = self.pool.page_tokens
        for i in range(row.registered, written // size):
            row.entry = self.pool.register(row.entry, row.token_ids[i * size : (i + 1) * size], row.pages[i])
            row.registered = i + 1

    def leave(self, row: Row) -> None:
        """The row needs its memory no more: take it back now, or else with the last step that writes it."""
        self.leaving.add(row)
        self.release(row)

    def release(self, row: Row) -> None:
        """Take back the memory of a row that leaves, unless a step in flight writes it."""
        if row.in_flight:
            return
        self.leaving.discard(row)
        # Last page first: of a chain the end is forgotten before the start, which alone is of no use without it.
        blank = [page for page in reversed(row.pages) if self.pool.release(page)]
        if row.poisoned:
            self._blank += blank
        elif self._left is not None and row.computed:
            self._left.keep(row.pages[0], row.token_ids[: row.computed])
        self._slots.append(row.slot)
        row.pages, row.slot, row.registered, row.entry = [], -1, 0, ROOT

    def take_blank(self) -> list[int]:
        """Freed pages that may hold NaN: they are to be zeroed before the next step (masked NaN is still NaN)."""
        pages, self._blank = self._blank, []
        return pages

    def check(self, running: Sequence[Row]) -> None:
        """Compare the books of pages and slots with the rows (for tests). Raises RuntimeError."""
        holders = [*running, *self.leaving]
        self.pool.check([row.pages for row in holders])
        slots = sorted([*self._slots, *(row.slot for row in holders)])
        if slots != list(range(self._all_slots)):
            raise RuntimeError(f"slots are lost or used twice: {slots}")
