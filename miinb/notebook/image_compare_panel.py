"""The compare panel of pictures: two deployments, one prompt and seed; pictures side by side, times as bars, votes."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from miinb.errors import MiinbError
from miinb.image_results import KEPT, ImageResult
from miinb.notebook import cards
from miinb.notebook.controls import PICTURING, control, named, prompt_area
from miinb.notebook.image_cards import GRID, figure
from miinb.notebook.image_controls import ImageControls
from miinb.notebook.image_panel import TIMEOUT_S
from miinb.notebook.image_progress import ImageProgress
from miinb.notebook.inline import caption
from miinb.notebook.pair_cards import Side, Sides, bars_card, ratio_words
from miinb.notebook.pair_panel import Pair, PairPanel
from miinb.notebook.viewer import VIEWS, PairViewer, words_of
from miinb.wording import printable

if TYPE_CHECKING:
    from miinb.session import Session

#: Bytes of the files that a history keeps; the oldest pairs go first.
MOST_BYTES = 128 << 20
#: Pixels of a picture's longer side in a column and in a card, bytes of all that a side shows, and how many these are.
_SIDE, _CARD_SIDE, _SIDE_BYTES, _MOST_SHOWN = 384, 320, 400_000, 4
_TIMES = (
    ("text encoder", "text_encode_s"),
    ("steps", "steps_s"),
    ("VAE", "vae_s"),
    ("files", "picture_s"),
    ("whole answer", "e2e_s"),
)


def picture(side: Side, place: int) -> Any:
    """A side's picture of PIL's; None where there is none."""
    from PIL import Image

    files = side.result.files if isinstance(side.result, ImageResult) else ()
    return Image.open(io.BytesIO(files[place])).convert("RGB") if place < len(files) else None


class PicturePair(Pair):
    """A prompt and the pictures of both sides."""

    @property
    def count(self) -> int:
        """Pictures of each side; 0 while one is missing."""
        return min(len(side.result.files) if isinstance(side.result, ImageResult) else 0 for side in self.sides)

    def pictures(self, place: int) -> tuple[Any, Any]:
        """The two of one seed."""
        return picture(self.sides[0], place), picture(self.sides[1], place)

    def differences(self) -> str:
        """How far the pictures lie apart, a sentence for each seed."""
        seeds = self.sides[0].result.seeds if self.sides[0].result is not None else ()
        lines = [(seed, words_of(self.pictures(place))) for place, seed in enumerate(seeds[: self.count])]
        if len(lines) == 1:
            return lines[0][1]
        return "\n".join(f"seed {seed}: {words}" for seed, words in lines)

    def speed_of(self, sides: Sides, names: Sequence[str]) -> str:
        """See `Pair`: the whole time of as many pictures."""
        first, second = sides
        if not (self.count and first.e2e_s and second.e2e_s):
            return ""
        return ratio_words(first.e2e_s / second.e2e_s, names)

    def card(self) -> cards.Card:
        """Prompt, pictures, times and differences, static."""
        sides = "".join(
            f'<div><div style="{cards.QUIET}">{cards.escaped(name)}</div>{side_html(side, _CARD_SIDE)}</div>'
            for name, side in zip(self.names, self.sides, strict=True)
        )
        head = f'<div style="opacity:.72">{cards.pre(self.prompt)}</div><hr style="opacity:.35;margin:.4em 0">'
        apart = self.differences() if self.complete else ""
        shown = self.complete and self.revealed
        times = bars_card(self.sides, self.names, _TIMES, self.speed) if shown else ("", "")
        body = [head, f'<div style="{GRID}">{sides}</div>', cards.pre(apart) if apart else "", times[0]]
        html, _ = cards.card("", body=body, foot=self.foot())
        errors = [f"[{name}] {side.error}" for name, side in zip(self.names, self.sides, strict=True) if side.error]
        lines = [f"> {self.prompt}", f"{' and '.join(self.names)}", *errors, apart, times[1], f"({self.foot()})"]
        return html, printable("\n".join(line for line in lines if line))

    def facts(self) -> list[dict[str, Any]]:
        """Seeds and sizes; the pictures themselves are files of their own."""
        return [
            {"seeds": list(side.result.seeds), "warnings": list(side.result.warnings)}
            if isinstance(side.result, ImageResult)
            else {}
            for side in self.sides
        ]


def side_html(side: Side, pixels: int) -> str:
    """A side's pictures, or why there are none."""
    if side.error:
        return f'<div style="overflow-wrap:anywhere">⚠ {cards.escaped(side.error)}</div>'
    if not isinstance(side.result, ImageResult):
        return ""
    result = side.result
    some = list(zip(result.prompts, result.seeds, result.flagged, strict=True))[:_MOST_SHOWN]
    pixels = pixels if len(some) == 1 else pixels // 2
    figures = [
        figure(picture(side, place), caption(*words), pixels, _SIDE_BYTES // len(some), note=f"seed {words[1]}")
        for place, words in enumerate(some)
    ]
    rest = len(result.files) - len(some)
    more = f'<div style="{cards.QUIET}">{rest} more: choose one below</div>' if rest else ""
    return f'<div style="{GRID}">{"".join(figures)}</div>{more}'


class ImageComparePanel(PairPanel):
    """Two deployments paint the same prompt; see `PairPanel`.

    Below the two columns one pair of pictures can be looked at by a slider, in turns, or by what differs.

    Args:
        session: the first deployment; the second is another that runs, if there is one.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session, session.task, PICTURING)
        self.prompt = prompt_area("What both pictures show", example="a lighthouse at dusk, oil painting", rows=3)
        self.controls = ImageControls(previews=False)
        self._progress = ImageProgress()
        self.viewer = PairViewer(self._lock, VIEWS[1:])  # side by side they stand above it
        self.which = control(W.Dropdown, "picture", "Which of the pictures is looked at below", options=[("1", 0)])
        self.which.observe(self._looked, "value")
        self._looking = named(W.VBox([self.which, self.viewer.box], layout={"display": "none"}), "looking")
        self.children = [
            *(self._head, self._past, self.prompt, self.controls.negative, self._acts, self.controls.box),
            *(self.status, self._progress.box, self._both, self.output, self._ballot, self._looking),
        ]
        self._complete()

    def _pair(self, text: str, sides: Sides, swapped: bool) -> PicturePair:
        return PicturePair(text, text, self.controls.values(), sides, self.blind.value, swapped)

    # The worker

    def _ask(self, pair: PicturePair, number: int, session: Session) -> None:
        side, began = pair.sides[number], time.monotonic()

        def told(step: int, total: int) -> None:
            if not self._stop.is_set():
                took = cards.duration(time.monotonic() - began)
                self._say(f"{side.deployment}: step {step} of {total} · {took}")

        options: dict[str, Any] = {**pair.parameters, "timeout_s": TIMEOUT_S}
        if not pair.blind:
            with self._lock:
                self._progress.begin(pair.parameters["num_inference_steps"])
            options["on_progress"] = self._progress.taking(self._lock, told)
        try:
            result: Any = self._awaited(lambda: session.agenerate(pair.request, **options))
        except MiinbError as error:  # half a side is not compared
            error.hint = error.hint.replace(KEPT, "").rstrip()
            raise
        side.result = dataclasses.replace(result, images=())  # the files hold them
        if not pair.blind:
            with self._lock:
                self._show_side(pair, number)

    # What is shown; the lock is held

    def _set_busy(self, busy: bool) -> None:
        super()._set_busy(busy)
        if not busy:
            self._progress.end()
            self._make_room()

    def _make_room(self) -> None:
        """Forget the oldest pairs, where the files of all take too much; the last one stays."""
        room = MOST_BYTES
        for kept, pair in enumerate(reversed(self.history)):
            results = (side.result for side in pair.sides if isinstance(side.result, ImageResult))
            room -= sum(len(file) for result in results for file in result.files)
            if room < 0 and kept:
                self._history.drop_oldest(len(self.history) - kept)
                break

    def _show_side(self, pair: PicturePair, number: int) -> None:
        hidden = pair.blind and not pair.complete and not pair.revealed
        head = f"<div><b>{cards.escaped(pair.names[number])}</b></div>"
        html = "" if hidden else side_html(pair.sides[number], _SIDE)
        (self.left, self.right)[number].value = cards.box(head + html)

    def _show_both(self, pair: PicturePair) -> None:
        shown = pair.complete and pair.revealed
        self.output.value = bars_card(pair.sides, pair.names, _TIMES, pair.speed)[0] if shown else ""
        count = pair.count if pair.complete else 0
        self._looking.layout.display = None if count else "none"
        self.which.layout.display = None if count > 1 else "none"
        self.which.unobserve(self._looked, "value")
        seeds = pair.sides[0].result.seeds if pair.sides[0].result is not None else ()
        options = [(f"seed {seed}", place) for place, seed in enumerate(seeds[:count])] or [("1", 0)]
        if list(self.which.options) != options:
            self.which.options = options
            self.which.value = 0
        self.which.observe(self._looked, "value")
        self._look(pair)

    def _look(self, pair: PicturePair) -> None:
        two = pair.pictures(self.which.value) if pair.complete and pair.count else None
        self.viewer.show(two, pair.names)

    def _looked(self, _: Any) -> None:
        with self._lock:
            if self.history:
                self._look(self._history.shown)

    def _load(self, pair: PicturePair) -> None:
        self.controls.load(pair.parameters)

    def _closing(self) -> None:
        super()._closing()
        self.viewer.close()
        self.which.unobserve(self._looked, "value")
