"""The compare panel of texts: two answers side by side, the first difference marked, times as bars."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miinb.notebook import cards
from miinb.notebook.controls import GENERATING, GenerationControls, prompt_area
from miinb.notebook.pair_cards import Sides, marks_of, pair_card, speed_words, text_html, times_card
from miinb.notebook.pair_panel import VOTE_COLUMNS, Pair, PairPanel
from miinb.notebook.streaming import Throttle

if TYPE_CHECKING:
    from miinb.session import Session

#: Updates a second of one side; two texts travel in the time of one.
_HZ = 5.0


class TextPair(Pair):
    """A prompt and its two texts."""

    def speed_of(self, sides: Sides, names: Sequence[str]) -> str:
        """See `Pair`: answers of different lengths by the time for each token."""
        return speed_words(sides, names)

    def card(self) -> cards.Card:
        """Prompt and answers, static."""
        speed = self.speed if self.revealed else None
        return pair_card(self.prompt, self.sides, self.names, speed=speed, foot=self.foot())

    def facts(self) -> list[dict[str, Any]]:
        """The texts."""
        return [{"text": side.text} for side in self.sides]

    def row(self) -> dict[str, Any]:
        """The vote with both texts."""
        left, right = self.sides
        return super().row() | {"left_text": left.text, "right_text": right.text}


class ComparePanel(PairPanel):
    """Two deployments go on with the same prompt; see `PairPanel`.

    Args:
        session: the first deployment; the second is another that runs, if there is one.
    """

    _COLUMNS = (*VOTE_COLUMNS[:8], "left_text", "right_text", *VOTE_COLUMNS[8:], "parameters")

    def __init__(self, session: Session) -> None:
        super().__init__(session, "text-generation", GENERATING)
        self.prompt = prompt_area("The text that both models continue")
        self.controls = GenerationControls()
        self.children = [
            *(self._head, self._past, self.prompt, self._acts, self.controls.box),
            *(self._both, self.output, self._ballot, self.status),
        ]
        self._complete()

    def _pair(self, text: str, sides: Sides, swapped: bool) -> TextPair:
        request, parameters = self.controls.request(text), self.controls.values()
        return TextPair(text, request, parameters, sides, self.blind.value, swapped)

    # The worker

    def _ask(self, pair: TextPair, number: int, session: Session) -> None:
        """The answer's text, shown while it grows; not of a blind pair, where the speed would tell which it is."""
        side = pair.sides[number]
        stream = session.stream(pair.request, **pair.parameters)
        self._cancel_with(stream.cancel)
        throttle, tokens, began = Throttle(_HZ, frugal=True), 0, time.monotonic()
        for chunk in stream:
            side.text += chunk.text
            tokens += len(chunk.token_ids)
            if not pair.blind and throttle.due(side.text, tokens):
                with self._lock:
                    self._show_side(pair, number)
                    if not self._stop.is_set():
                        self._say(f"{side.deployment}: {tokens} tokens · {time.monotonic() - began:.1f} s")
        side.text, side.result = stream.result.text, stream.result

    # What is shown; the lock is held

    def _show_side(self, pair: TextPair, number: int) -> None:
        side, mark = pair.sides[number], marks_of(pair.sides)[number]
        hidden = pair.blind and not pair.complete and not pair.revealed
        head = f"<div><b>{cards.escaped(pair.names[number])}</b></div>"
        (self.left, self.right)[number].value = cards.box(head + ("" if hidden else text_html(side, mark)))

    def _show_both(self, pair: TextPair) -> None:
        shown = pair.complete and pair.revealed
        self.output.value = times_card(pair.sides, pair.names, pair.speed)[0] if shown else ""

    def _load(self, pair: TextPair) -> None:
        self.controls.load(pair.parameters, pair.request)
