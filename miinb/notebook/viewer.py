"""Two pictures of one size looked at together: side by side, by a slider, in turns, and what differs made bright."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence
from typing import Any

import ipywidgets as W

from miinb.errors import InvalidValue
from miinb.image_difference import difference, difference_picture
from miinb.notebook import cards
from miinb.notebook.cards import QUIET, Card, escaped
from miinb.notebook.controls import control, named
from miinb.notebook.image_cards import GRID, figure
from miinb.notebook.inline import img, in_squares, shown_width
from miinb.notebook.work_panel import ROW
from miinb.wording import printable

VIEWS = ("side by side", "slider", "in turns", "difference")
GAINS = (1, 4, 16, 64)
#: Pixels of a picture's longer side, and bytes of one that stays in the notebook.
_SIDE, _BYTES = 512, 150_000
_SLIDER_QUALITY, _TURN_MS = 85, 700
#: Updates a second while the slider moves.
_HZ = 8.0

Two = tuple[Any, Any]


def words_of(pair: Two) -> str:
    """How far two pictures lie apart, in a sentence; of two sizes that they cannot be compared."""
    try:
        return str(difference(*pair))
    except InvalidValue as error:
        return error.message


def pair_html(pair: Two, names: tuple[str, str], *, side: int = _SIDE, most_bytes: int = _BYTES) -> str:
    """Two pictures side by side, static."""
    figures = (
        f'<div style="flex:0 1 auto;min-width:0">{figure(image, name, side, most_bytes)}</div>'
        for image, name in zip(pair, names, strict=True)
    )
    return f'<div style="display:flex;gap:.7em;margin:.3em 0">{"".join(figures)}</div>'


def difference_html(pair: Two, names: tuple[str, str], gain: int, side: int = _SIDE) -> str:
    """What differs, made bright, static; "" where nothing does, and for pictures of two sizes."""
    if pair[0].size != pair[1].size or difference(*pair).equal:
        return ""
    words = f"Difference of {names[0]} and {names[1]}, {gain} times as bright"
    return f'<div style="{GRID}">{figure(difference_picture(*pair, gain), words, side, _BYTES)}</div>'


def comparison_card(pair: Two, names: tuple[str, str], gain: int = GAINS[1]) -> Card:
    """Two pictures, what differs and the numbers, static."""
    words, side = words_of(pair), 360
    apart = difference_html(pair, names, gain, side)
    body = [f'<div style="{GRID}">{pair_html(pair, names, side=side)}{apart}</div>']
    html, _ = cards.card("", body=body, foot=words)
    return html, printable(f"{names[0]} and {names[1]}: {words}")


class PairViewer:
    """Two pictures under one choice of views.

    Args:
        lock: of the panel.
        views: the choice, of `VIEWS`; pictures of two sizes are only ever shown side by side.

    Attributes:
        box: the widget.
    """

    def __init__(self, lock: threading.RLock, views: Sequence[str] = VIEWS) -> None:
        self._lock = lock
        self._pair: Two | None = None
        self._small: Two | None = None  # as large as the slider shows them
        self._names = ("A", "B")
        self._timer: threading.Timer | None = None
        self._next = 0.0
        self.view = control(W.Dropdown, "view", "How the two are shown", options=views)
        self.position = control(
            W.IntSlider, "position", "Left of the line is the first picture", value=50, min=0, max=100
        )
        self.position.layout.width = "30em"
        gains = [(f"{gain} times", gain) for gain in GAINS]
        self.gain = control(W.Dropdown, "brightness", "Of the differences", options=gains, value=GAINS[1])
        self.picture = named(W.HTML(layout={"width": "auto"}), "pair")
        self.words = named(W.HTML(), "difference-words")
        head = W.Box([self.view, self.position, self.gain], layout=ROW)
        self.box = named(W.VBox([head, self.words, self.picture]), "viewer")
        for widget in (self.view, self.gain):
            widget.observe(self._changed, "value")
        self.position.observe(self._moved, "value")
        self.show(None, self._names)

    def show(self, pair: Two | None, names: tuple[str, str]) -> None:
        """Show two pictures of PIL's, or none; the view stays. The lock is held."""
        self._pair, self._small, self._names = pair, None, names
        alike = pair is not None and pair[0].size == pair[1].size
        self.view.disabled = not alike
        said = words_of(pair) if pair is not None else ""
        self.words.value = f"<div><b>{escaped(said)}</b></div>" if said else ""
        self._draw()

    def card(self) -> Card | None:
        """The two pictures, what differs and the numbers, static."""
        return comparison_card(self._pair, self._names, self.gain.value) if self._pair is not None else None

    def close(self) -> None:
        """Detach the observers, and end what would still be drawn."""
        with self._lock:
            timer, self._timer, self._pair = self._timer, None, None
        if timer is not None:
            timer.cancel()
            timer.join(1.0)
        for widget in (self.view, self.gain, self.position):
            widget.unobserve_all()

    # What is shown

    def _changed(self, _: Any) -> None:
        with self._lock:
            self._draw()

    def _moved(self, _: Any) -> None:
        """Draw at most so many times a second, the last position always."""
        with self._lock:
            wait_s = self._next - time.monotonic()
            if wait_s <= 0:
                self._draw()
            elif self._timer is None:
                self._timer = threading.Timer(wait_s, self._late)
                self._timer.name, self._timer.daemon = "miinb-panel-slider", True
                self._timer.start()

    def _late(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer = None
                self._draw()

    def _draw(self) -> None:
        self._next = time.monotonic() + 1 / _HZ
        view = VIEWS[0] if self.view.disabled else self.view.value
        self.position.layout.display = None if view == "slider" else "none"
        self.gain.layout.display = None if view == "difference" else "none"
        if self._pair is None:
            self.picture.value = ""
        elif view == "slider":
            self.picture.value = self._slid()
        elif view == "in turns":
            self.picture.value = self._in_turns()
        elif view == "difference":
            self.picture.value = difference_html(self._pair, self._names, self.gain.value)
        else:
            self.picture.value = pair_html(self._pair, self._names)

    def _sized(self) -> Two:
        """Both as large as they are shown."""
        assert self._pair is not None
        if self._small is None:
            width = shown_width(self._pair[0], _SIDE)
            size = (width, max(1, round(width * self._pair[0].height / self._pair[0].width)))
            how = 0 if in_squares(self._pair[0]) else None
            first, second = (image.convert("RGB").resize(size, how) for image in self._pair)
            self._small = (first, second)
        return self._small

    def _slid(self) -> str:
        """One picture left of a line, the other right of it."""
        left, right = self._sized()
        place = round(left.width * self.position.value / 100)
        both = right.copy()
        both.paste(left.crop((0, 0, place, left.height)), (0, 0))
        for offset, color in ((-1, "black"), (0, "white"), (1, "black")):
            if 0 <= place + offset < both.width and 0 < self.position.value < 100:
                both.paste(color, (place + offset, 0, place + offset + 1, both.height))
        buffer = io.BytesIO()
        both.save(buffer, "JPEG", quality=_SLIDER_QUALITY)
        share = self.position.value
        words = f"{self._names[0]} left of {share}%, {self._names[1]} right of it"
        ends = f'<span>{escaped(self._names[0])}</span><span style="float:right">{escaped(self._names[1])}</span>'
        head = f'<div style="{QUIET};width:{left.width}px;max-width:100%">{ends}</div>'
        return head + img(buffer.getvalue(), "jpeg", words, left.width)

    def _in_turns(self) -> str:
        """Both in one place, one after the other: an animation of two frames, less than two a second."""
        left, right = self._sized()
        buffer = io.BytesIO()
        left.save(buffer, "WEBP", save_all=True, append_images=[right], duration=_TURN_MS, loop=0, quality=85)
        words = f"{self._names[0]} and {self._names[1]} in turns"
        return img(buffer.getvalue(), "webp", words, left.width) + f'<div style="{QUIET}">{escaped(words)}</div>'
