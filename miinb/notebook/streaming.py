"""Text that grows in a cell: one display, replaced at most some ten times a second, static at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from IPython.display import display

from miinb.commands.screen import Place, PlainScreen, TextStream
from miinb.notebook import cards
from miinb.notebook.markdown import rendered
from miinb.wording import printable

#: Bytes a second that updates may cost: Jupyter drops output above 1 MB/s, and each update carries the whole text.
_BYTES_PER_S = 300_000


#: Of frugal updates: what one costs besides the text, and what an answer may cost at its begin and for each token.
UPDATE_BYTES = 700
FREE_BYTES = 8_000
BYTES_PER_TOKEN = 85


class Throttle:
    """Says when the next update is due: some ten times a second, less often for long texts and for few new tokens.

    Args:
        hz: most updates a second.
        frugal: all updates of an answer together are small, however long it takes (`bytes_for`): those of widgets.
    """

    def __init__(self, hz: float = 10.0, *, frugal: bool = False) -> None:
        self._least = 1.0 / hz
        self._next = 0.0
        self._frugal = frugal
        self._spent = 0

    def due(self, text: str, tokens: int = 0) -> bool:
        """Whether to send this text now; its length sets the time of the next one.

        Args:
            text: all of the answer so far.
            tokens: how many it has.
        """
        now = time.monotonic()
        if now < self._next:
            return False
        if self._frugal:
            spent = self._spent + UPDATE_BYTES + len(text.encode("utf-8", "replace"))
            if spent > bytes_for(tokens):
                return False
            self._spent = spent
        self._next = now + max(self._least, 2 * len(text) / _BYTES_PER_S)
        return True


def bytes_for(tokens: int) -> int:
    """What the updates of an answer of so many tokens may cost together."""
    return FREE_BYTES + BYTES_PER_TOKEN * tokens


class LiveDisplay:
    """A place in the cell's output whose content is replaced."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, card: cards.Card) -> None:
        """Put this card in the place, at once."""
        data = cards.bundle(card)
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class CellPlace:
    """A place in the cell's output for things with a card of their own."""

    def __init__(self) -> None:
        self._display = LiveDisplay()

    def show(self, thing: Any) -> None:
        """Put its card there."""
        data = thing._repr_mimebundle_()
        self._display.show((data["text/html"], data["text/plain"]))


class CellScreen:
    """Shows things in the running cell; in a terminal's IPython, which cannot replace output, it prints."""

    def __init__(self, *, live: bool, hz: Callable[[], float]) -> None:
        self._live = live
        self._hz = hz

    def show(self, thing: Any, *, markdown: bool = False) -> None:
        """Text is printed, anything else displayed."""
        if isinstance(thing, str):
            print(printable(thing))
        elif markdown:
            display(cards.bundle(cards.result_card(thing, rendered)), raw=True)
        else:
            display(thing)

    def place(self) -> Place:
        """A display that is replaced; in a terminal lines that are."""
        return CellPlace() if self._live else PlainScreen().place()

    def stream(self, stream: TextStream, *, markdown: bool = False) -> Any:
        """Show an answer while it grows; its `Result`. The Stop button leaves the text so far."""
        if not self._live:
            return PlainScreen().stream(stream)
        written = rendered if markdown else cards.pre
        place, throttle = LiveDisplay(), Throttle(self._hz())
        place.show(cards.live_card("", "waiting for the first token …"))
        text, tokens, began = "", 0, time.monotonic()
        try:
            for chunk in stream:
                text += chunk.text
                tokens += len(chunk.token_ids)
                if throttle.due(text):
                    place.show(cards.live_card(text, f"{tokens} tokens · {time.monotonic() - began:.1f} s", written))
        except BaseException:
            ended = "interrupted" if isinstance(sys.exception(), KeyboardInterrupt) else "failed"
            place.show(cards.live_card(text, f"{ended} after {tokens} tokens", written) if text else ("", ""))
            raise
        result = stream.result
        place.show(cards.result_card(result, written))
        return result
