"""The gallery of an image panel: pictures as thumbnails on pages, one of them chosen; what they may take is bounded."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from miinb.notebook import cards
from miinb.notebook.controls import button, named
from miinb.notebook.image_cards import GRID, figure
from miinb.notebook.inline import caption, fitted, img
from miinb.notebook.work_panel import ROW
from miinb.wording import printable

if TYPE_CHECKING:
    from miinb.image_results import ImageResult

#: Pictures of a page, pixels of a thumbnail's longer side and bytes that it may have.
PAGE, _THUMB_SIDE, _THUMB_BYTES = 12, 120, 12_000
#: Pictures that a gallery keeps, and bytes of their files: of the oldest ones above that only thumbnails are kept.
MOST, MOST_BYTES = 240, 256 << 20
#: Of a picture that stays in the notebook, and of the largest in a panel: pixels of the longer side, and bytes.
_CARD_SIDE, _CARD_BYTES = 384, 120_000
_LARGE_SIDE, _LARGE_BYTES = 640, 300_000
_CELL = _THUMB_SIDE + 12
_TEXT = 28  # pixels of the line below a thumbnail
_NONE = "no picture"


@dataclass(eq=False)
class GalleryPicture:
    """A picture of a gallery.

    Attributes:
        number: its place among all that the gallery ever had, from 1.
        prompt: the text.
        parameters: of `Session.generate`, which make it again: one picture, seed, width and height included.
        deployment: that made it.
        seconds: the whole request took, over its pictures.
        flagged: the model's safety checker made it black.
        file: with the parameters inside; None when it was dropped to make room.
        thumb: a small WebP file.
    """

    number: int
    prompt: str
    parameters: dict[str, Any]
    deployment: str
    seconds: float
    flagged: bool
    file: bytes | None = field(repr=False)
    thumb: bytes = field(repr=False)

    @property
    def image(self) -> Any:
        """The picture of PIL's; its thumbnail where the file was dropped."""
        from PIL import Image

        return Image.open(io.BytesIO(self.file or self.thumb)).convert("RGB")

    @property
    def seed(self) -> int:
        """That makes it again."""
        return int(self.parameters["seed"])

    @property
    def name(self) -> str:
        """Its number and seed."""
        return f"{self.number} · seed {self.seed}"

    @property
    def label(self) -> str:
        """The same as short as a thumbnail is wide."""
        return f"{self.number} · {self.seed}"

    @property
    def words(self) -> str:
        """What stands for it where it is not seen."""
        return caption(self.prompt, self.seed, self.flagged)

    def _facts(self) -> list[tuple[str, Any]]:
        shown = {"negative_prompt": "negative", "num_inference_steps": "steps", "guidance_scale": "guidance"}
        known = {name: value for name, value in self.parameters.items() if name not in ("width", "height")}
        known["size"] = f"{self.parameters['width']} x {self.parameters['height']}"
        rows = [(shown.get(name, name), value) for name, value in known.items()]
        return [*rows, ("deployment", self.deployment), ("took", cards.duration(self.seconds))]

    def card(self, side: int = _CARD_SIDE, most_bytes: int = _CARD_BYTES) -> cards.Card:
        """The picture with all that made it, static."""
        notes = ["made black by the model's safety checker"] * self.flagged
        if self.file is None:
            notes.append("only its thumbnail was kept: Same again makes it once more")
        table, text = cards.facts_table(self._facts())
        picture = figure(self.image, self.words, side, most_bytes, note=" · ".join([f"Picture {self.name}", *notes]))
        frame = "display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start"
        html = f'<div style="{frame}">{picture}<div style="flex:1 1 16em">{cards.pre(self.prompt)}{table}</div></div>'
        lines = [f"> {self.prompt}", f"Picture {self.name}", text, *notes]
        return cards.box(html), printable("\n".join(lines))

    def large_html(self) -> str:
        """The same, as large as a panel shows it."""
        return self.card(_LARGE_SIDE, _LARGE_BYTES)[0]


def pictures_of(
    result: ImageResult, parameters: dict[str, Any], deployment: str, first_number: int
) -> list[GalleryPicture]:
    """The pictures of a result, for a gallery.

    Args:
        result: of one prompt.
        parameters: that it was asked with.
        deployment: the one that was asked.
        first_number: of its first picture.
    """
    kept = {name: value for name, value in parameters.items() if name != "num_images_per_prompt"}
    made = []
    each = zip(result.images, result.files, result.seeds, result.prompts, result.flagged, strict=True)
    for place, (image, file, seed, prompt, flagged) in enumerate(each):
        values = kept | {"seed": seed, "width": image.width, "height": image.height}
        thumb = fitted(image, _THUMB_SIDE, _THUMB_BYTES)
        seconds = result.timing.s_per_image
        made.append(
            GalleryPicture(first_number + place, prompt, values, deployment, seconds, flagged, bytes(file), thumb)
        )
    return made


class _Cell:
    """A thumbnail with the button that chooses it: the button lies over it, so that a click on the picture counts."""

    def __init__(self, on_click: Callable[[Any], None]) -> None:
        size = f"{_CELL}px"
        self._thumb = W.HTML(layout={"width": size, "height": size, "margin": "0"})
        self.choose = button(_NONE, "choose", _NONE, on_click)
        layout = self.choose.layout
        layout.width, layout.height = size, f"{_CELL + _TEXT}px"
        layout.margin, layout.padding = f"-{_CELL}px 0 0 0", f"{_CELL}px 0 0 0"
        self.choose.style.button_color = "transparent"
        self.box = W.VBox([self._thumb, self.choose], layout={"width": size, "margin": "2px", "display": "none"})
        self.picture: GalleryPicture | None = None

    def show(self, picture: GalleryPicture | None, chosen: bool) -> None:
        """Show a picture, or nothing."""
        if picture is not self.picture:
            self.picture = picture
            self._thumb.value = "" if picture is None else _thumb_html(picture)
            self.choose.description = _NONE if picture is None else picture.label
            self.choose.tooltip = _NONE if picture is None else f"Picture {picture.number}: {picture.words}"
            self.box.layout.display = "none" if picture is None else None
        self.choose.icon = "check" if chosen else ""
        self.choose.layout.border = "2px solid rgb(0,114,178)" if chosen else "1px solid rgba(128,128,128,.35)"


def _thumb_html(picture: GalleryPicture) -> str:
    width, height = picture.parameters["width"], picture.parameters["height"]
    wide = max(1, round(_THUMB_SIDE * width / max(width, height)))
    place = f"display:flex;align-items:center;justify-content:center;width:{_CELL}px;height:{_CELL}px;line-height:0"
    return f'<div style="{place}">{img(picture.thumb, "webp", picture.words, wide)}</div>'


class Gallery:
    """Pictures on pages of 12, oldest first; of new ones the first is chosen.

    Args:
        lock: of the panel.
        show: called with the lock held when another picture is chosen, or none.

    Attributes:
        pictures: all that are kept.
        chosen: the one that is shown large; None without pictures.
        box: the widget.
    """

    def __init__(self, lock: threading.RLock, show: Callable[[GalleryPicture | None], None]) -> None:
        self.pictures: list[GalleryPicture] = []
        self.chosen: GalleryPicture | None = None
        self.before: GalleryPicture | None = None  # that was chosen before
        self._lock, self._show, self._page, self._made = lock, show, 0, 0
        self._cells = [_Cell(self._chooser(place)) for place in range(PAGE)]
        self.previous = button("◀", "page-back", "Earlier pictures", lambda _: self._turn(-1))
        self.next = button("▶", "page-on", "Later pictures", lambda _: self._turn(1))
        self._where = named(W.Label(), "page")
        self._pager = W.Box([self.previous, self._where, self.next], layout=ROW)
        grid = W.Box([cell.box for cell in self._cells], layout={"flex_flow": "row wrap"})
        self.box = named(W.VBox([grid, self._pager], layout={"display": "none"}), "gallery")

    @property
    def next_number(self) -> int:
        """Of the next picture."""
        return self._made + 1

    def add(self, pictures: Sequence[GalleryPicture]) -> None:
        """New pictures, of which the first is chosen then."""
        if not pictures:
            return
        self.pictures.extend(pictures)
        self._made = pictures[-1].number
        del self.pictures[:-MOST]
        self._make_room()
        self.choose(self.pictures[-min(len(pictures), MOST)])

    def remove(self, picture: GalleryPicture) -> None:
        """Forget a picture; the one beside it is chosen then."""
        place = self.pictures.index(picture)
        self.pictures.remove(picture)
        if self.before is picture:
            self.before = None
        beside = self.pictures[min(place, len(self.pictures) - 1)] if self.pictures else None
        if picture is self.chosen:
            self.chosen = None
            self.choose(beside)
        else:
            self.refresh()

    def choose(self, picture: GalleryPicture | None) -> None:
        """Show this one large, and the page that it is on."""
        if self.chosen is not None and picture is not self.chosen:
            self.before = self.chosen
        self.chosen = picture
        if picture is not None:
            self._page = self.pictures.index(picture) // PAGE
        self.refresh()
        self._show(picture)

    def refresh(self) -> None:
        """Show the page as it is."""
        pages = max(1, -(-len(self.pictures) // PAGE))
        self._page = min(max(self._page, 0), pages - 1)
        shown = self._shown()
        for place, cell in enumerate(self._cells):
            picture = shown[place] if place < len(shown) else None
            cell.show(picture, picture is not None and picture is self.chosen)
        self._where.value = f"Page {self._page + 1} of {pages} · {len(self.pictures)} pictures"
        self.previous.disabled, self.next.disabled = self._page == 0, self._page == pages - 1
        self._pager.layout.display = None if pages > 1 else "none"
        self.box.layout.display = None if self.pictures else "none"

    def page_card(self) -> cards.Card | None:
        """The thumbnails of the page that is shown, static; None where there is one picture or none."""
        if len(self.pictures) < 2:
            return None
        shown = self._shown()
        figures = "".join(
            f'<figure style="margin:0;width:{_CELL}px">{_thumb_html(one)}'
            f'<figcaption style="{cards.QUIET};text-align:center">{cards.escaped(one.label)}</figcaption></figure>'
            for one in shown
        )
        where = f"{len(self.pictures)} pictures in the gallery (number · seed)"
        rest = f"{where}, {len(shown)} of them here" if len(shown) < len(self.pictures) else where
        html = f'<div style="{cards.QUIET}">{rest}</div><div style="{GRID}">{figures}</div>'
        return html, f"{rest}: {', '.join(one.name for one in shown)}"

    def named(self, numbers: Iterable[int]) -> list[GalleryPicture]:
        """The pictures of these numbers that are still there."""
        known = {picture.number: picture for picture in self.pictures}
        return [known[number] for number in numbers if number in known]

    def _shown(self) -> list[GalleryPicture]:
        return self.pictures[self._page * PAGE : (self._page + 1) * PAGE]

    def _make_room(self) -> None:
        """Keep the files of the newest pictures alone, where all together are too large; the last one always."""
        room = MOST_BYTES
        for picture in reversed(self.pictures):
            room -= len(picture.file or b"")
            if room < 0 and picture is not self.pictures[-1]:
                picture.file = None

    def _chooser(self, place: int) -> Callable[[Any], None]:
        def chosen(_: Any) -> None:
            with self._lock:
                picture = self._cells[place].picture
                if picture is not None:
                    self.choose(picture)

        return chosen

    def _turn(self, by: int) -> None:
        with self._lock:
            self._page += by
            self.refresh()
