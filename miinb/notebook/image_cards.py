"""Cards of pictures: thumbnails with captions, and the same in words. Static: they need no kernel and no widgets."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING, Any

from miinb.notebook.cards import QUIET, Card, card, duration, escaped
from miinb.wording import one_line, printable, shortened

if TYPE_CHECKING:
    from miinb.image_results import ImageResult

#: Pixels of a thumbnail's longer side, and their format: a notebook holds every picture that it shows.
THUMB_SIDE, _QUALITY = 512, 88
#: Pictures that a card shows; `result.images` has all.
MOST_SHOWN = 16
_CAPTION_LENGTH = 120
_GRID = "display:flex;flex-wrap:wrap;gap:.7em;margin:.3em 0"


def images_card(result: ImageResult) -> Card:
    """The pictures of a result with their prompts and seeds, how long they took, and what was not read."""
    shown = list(zip(result.images, result.prompts, result.seeds, result.flagged, strict=True))[:MOST_SHOWN]
    figures = "".join(_figure(image, _caption(prompt, seed, flagged)) for image, prompt, seed, flagged in shown)
    notes = [*result.warnings]
    if (rest := len(result.images) - len(shown)) > 0:
        notes.append(f"{rest} more in .images")
    body = [f'<div style="{_GRID}">{figures}</div>', *(f'<div style="{QUIET}">{escaped(note)}</div>' for note in notes)]
    html, _ = card("", body=body, foot=images_line(result))
    return html, images_text(result)


def images_text(result: ImageResult) -> str:
    """The same in words, with every picture."""
    each = zip(result.images, result.prompts, result.seeds, result.flagged, strict=True)
    rows = [
        f"{image.width} x {image.height}  {_caption(prompt, seed, flagged)}" for image, prompt, seed, flagged in each
    ]
    return printable("\n".join([*rows, *result.warnings, f"({images_line(result)})"]))


def images_line(result: ImageResult) -> str:
    """ "4 images · 2.61 s · 0.65 s an image · text 12 ms, steps 2.3 s, VAE 44 ms"."""
    count, timing = len(result.images), result.timing
    parts = [f"{count} image{'s' * (count != 1)}", f"{duration(timing.e2e_s)} in all"]
    if count > 1:
        parts.append(f"{duration(timing.s_per_image)} an image")
    parts.append(
        f"text {duration(timing.text_encode_s)}, steps {duration(timing.steps_s)}, VAE {duration(timing.vae_s)}"
    )
    return " · ".join(parts)


def _caption(prompt: str, seed: int, flagged: bool) -> str:
    words = shortened(one_line(prompt), _CAPTION_LENGTH) or "(no prompt)"
    return f"{words} · seed {seed}" + (" · made black by the model's safety checker" if flagged else "")


def _figure(image: Any, caption: str) -> str:
    thumb = image.copy()
    thumb.thumbnail((THUMB_SIDE, THUMB_SIDE))
    buffer = io.BytesIO()
    thumb.save(buffer, "WEBP", quality=_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    words = escaped(caption)
    look = f"max-width:100%;width:{thumb.width}px;height:auto"
    picture = f'<img alt="{escape(printable(caption), quote=True)}" style="{look}" src="data:image/webp;base64,{data}">'
    frame = f"margin:0;max-width:{max(thumb.width, 160)}px"
    return f'<figure style="{frame}">{picture}<figcaption style="{QUIET}">{words}</figcaption></figure>'
