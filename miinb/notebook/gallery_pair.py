"""Two pictures of a gallery, chosen by lists, in one viewer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ipywidgets as W

from miinb.notebook.cards import Card
from miinb.notebook.controls import named, pin_button
from miinb.notebook.gallery import Gallery, GalleryPicture
from miinb.notebook.viewer import PairViewer
from miinb.notebook.work_panel import ROW


class GalleryPair:
    """Which two pictures are compared, and the viewer that shows them.

    Args:
        lock: of the panel.
        gallery: whose pictures they are; at first they are the one chosen before and the chosen one.
        pin: keeps what is shown in the notebook.

    Attributes:
        box: the widget.
        viewer: what shows the two.
    """

    def __init__(self, lock: threading.RLock, gallery: Gallery, pin: Callable[[Any], None]) -> None:
        self._lock, self._gallery = lock, gallery
        self.first, self.second = (
            named(
                W.Dropdown(description=label, tooltip=f"{label} picture of the comparison", layout={"width": "20em"}),
                f"compare-{label.lower()}",
            )
            for label in ("First", "Second")
        )
        self.viewer = PairViewer(lock)
        tooltip = "Keep both pictures and what differs in the notebook, below the panel"
        self.pinning = pin_button("Pin comparison", "pin-two", tooltip, pin)
        self.box = W.VBox([W.Box([self.first, self.second, self.pinning], layout=ROW), self.viewer.box])
        self._observe()

    @property
    def compared(self) -> Card | None:
        """The two, static; None while there are no two."""
        return self.viewer.card()

    def refresh(self) -> None:
        """Offer the gallery's pictures; the second one is the chosen picture, the first the one before. Lock held."""
        pictures, second = self._gallery.pictures, self._gallery.chosen
        options = [(picture.name, picture.number) for picture in pictures]
        first = self._gallery.before
        if first is None or first is second or first not in pictures:
            first = next((picture for picture in pictures if picture is not second), None)
        self._unobserve()
        for choice, picture in ((self.first, first), (self.second, second)):
            choice.options = options
            choice.value = picture.number if picture is not None else None
        self._observe()
        self._show()

    def close(self) -> None:
        """Detach the observers."""
        self._unobserve()
        self.viewer.close()

    def _observe(self) -> None:
        for choice in (self.first, self.second):
            choice.observe(self._changed, "value")

    def _unobserve(self) -> None:
        for choice in (self.first, self.second):
            choice.unobserve(self._changed, "value")

    def _changed(self, _: Any) -> None:
        with self._lock:
            self._show()

    def _show(self) -> None:
        found: list[GalleryPicture] = self._gallery.named(
            number for number in (self.first.value, self.second.value) if number is not None
        )
        if len(found) < 2:
            self.viewer.show(None, ("", ""))
            return
        one, two = found
        self.viewer.show((one.image, two.image), (f"Picture {one.name}", f"Picture {two.name}"))
