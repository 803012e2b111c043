"""Cards of pictures: thumbnails with captions, and the same in words. Static: they need no kernel and no widgets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miinb.notebook.cards import QUIET, Card, card, duration, escaped
from miinb.notebook.inline import caption, shown, shown_width
from miinb.wording import printable

if TYPE_CHECKING:
    from miinb.image_results import ImageResult

#: Pixels of a thumbnail's longer side by how many there are: a notebook holds every picture that it shows.
_SIDES = ((4, 512), (9, 320), (16, 256))
#: Pictures that a card shows (`result.images` has all), and bytes that they take together.
MOST_SHOWN, MOST_BYTES = 16, 1_000_000
GRID = "display:flex;flex-wrap:wrap;gap:.7em;margin:.3em 0"


def images_card(result: ImageResult) -> Card:
    """The pictures of a result with their prompts and seeds, how long they took, and what was not read."""
    some = list(zip(result.images, result.prompts, result.seeds, result.flagged, strict=True))[:MOST_SHOWN]
    side = next(side for count, side in _SIDES if len(some) <= count)
    room = MOST_BYTES // max(1, len(some))
    figures = "".join(
        figure(image, caption(prompt, seed, flagged), side, room) for image, prompt, seed, flagged in some
    )
    notes = [*result.warnings]
    if (rest := len(result.images) - len(some)) > 0:
        notes.append(f"{rest} more in .images")
    body = [f'<div style="{GRID}">{figures}</div>', *(f'<div style="{QUIET}">{escaped(note)}</div>' for note in notes)]
    html, _ = card("", body=body, foot=images_line(result))
    return html, images_text(result)


def images_text(result: ImageResult) -> str:
    """The same in words, with every picture."""
    each = zip(result.images, result.prompts, result.seeds, result.flagged, strict=True)
    rows = [
        f"{image.width} x {image.height}  {caption(prompt, seed, flagged)}" for image, prompt, seed, flagged in each
    ]
    return printable("\n".join([*rows, *result.warnings, f"({images_line(result)})"]))


def images_line(result: ImageResult) -> str:
    """ "4 images · 2.61 s in all · 0.65 s an image · text 12 ms, steps 2.3 s, VAE 44 ms", as far as it was measured."""
    count, timing = len(result.images), result.timing
    parts = [f"{count} image{'s' * (count != 1)}", f"{duration(timing.e2e_s)} in all"]
    if count > 1:
        parts.append(f"{duration(timing.s_per_image)} an image")
    measured = (("text", timing.text_encode_s), ("steps", timing.steps_s), ("VAE", timing.vae_s))
    if shares := ", ".join(f"{name} {duration(seconds)}" for name, seconds in measured if seconds):
        parts.append(shares)
    return " · ".join(parts)


def figure(image: Any, words: str, side: int, most_bytes: int, note: str | None = None) -> str:
    """A picture with a line below it; `words` stand for it where it is not seen, and below it without a `note`."""
    picture = shown(image, words, side, most_bytes)
    below = words if note is None else note
    frame = f"margin:0;max-width:{max(shown_width(image, side), 160)}px"
    return f'<figure style="{frame}">{picture}<figcaption style="{QUIET}">{escaped(below)}</figcaption></figure>'
