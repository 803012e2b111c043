"""The history of a panel: what was asked before, to go back to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ipywidgets as W

from miinb.notebook.controls import button, named

MOST = 50


class History:
    """Entries, oldest first, with a list to choose from and buttons to step through it.

    Args:
        lock: of the panel.
        busy: whether the panel works now; then no entry is chosen.
        title: an entry in a few words.
        show: called with the lock held when the user chose an entry.

    Attributes:
        entries: what the panel has added; the latest 50.
        controls: the widgets, in the order of a row.
    """

    def __init__(
        self,
        lock: threading.RLock,
        busy: Callable[[], bool],
        title: Callable[[Any], str],
        show: Callable[[Any], None],
    ) -> None:
        self.entries: list[Any] = []
        self._lock, self._busy, self._title, self._show = lock, busy, title, show
        self.choice = named(
            W.Dropdown(description="History", tooltip="Earlier prompts and answers", layout={"width": "22em"}),
            "history",
        )
        self.previous = button("◀", "previous", "Earlier answer", lambda _: self._step(-1))
        self.next = button("▶", "next", "Later answer", lambda _: self._step(1))
        self.controls = (self.choice, self.previous, self.next)
        self.choice.observe(self._chosen, "index")

    @property
    def index(self) -> int:
        """The place of the entry that is shown; -1 without one."""
        chosen = self.choice.index
        return chosen if chosen is not None and chosen < len(self.entries) else len(self.entries) - 1

    @property
    def shown(self) -> Any:
        """The entry that is shown; None without one."""
        return self.entries[self.index] if self.entries else None

    def add(self, entry: Any) -> None:
        """A new entry, which is the one that is shown then."""
        self.entries.append(entry)
        del self.entries[:-MOST]
        self.refresh()

    def drop_oldest(self, count: int) -> None:
        """Forget so many entries."""
        del self.entries[:count]
        self.refresh()

    def refresh(self) -> None:
        """The list's entries, the newest chosen, without acting on the choice."""
        words = (" ".join(self._title(entry).split())[:40] for entry in self.entries)
        shown = [(f"{i + 1}: {text}", i) for i, text in enumerate(words)]
        with self._unobserved():
            self.choice.options = shown
            self.choice.index = len(shown) - 1 if shown else None

    def deselect(self) -> None:
        """No entry is shown any more; a step back shows the latest."""
        with self._unobserved():
            self.choice.index = None

    @contextmanager
    def _unobserved(self) -> Iterator[None]:
        self.choice.unobserve(self._chosen, "index")
        yield
        self.choice.observe(self._chosen, "index")

    def set_busy(self, busy: bool) -> None:
        """Turn the controls on and off."""
        for control in self.controls:
            control.disabled = busy or not self.entries

    def close(self) -> None:
        """Detach the observer."""
        self.choice.unobserve_all()

    def _chosen(self, change: Any) -> None:
        with self._lock:
            if not self._busy() and change["new"] is not None and change["new"] < len(self.entries):
                self._show(self.entries[change["new"]])

    def _step(self, by: int) -> None:
        with self._lock:
            if self.entries and not self._busy():
                at = self.index if self.choice.index is not None else len(self.entries)
                self.choice.index = min(max(at + by, 0), len(self.entries) - 1)
