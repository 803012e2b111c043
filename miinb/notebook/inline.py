"""Pictures inside HTML: as small files in the text itself, so that they need no kernel, no widget and no server."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

from miinb.wording import one_line, printable, shortened

#: Tried one after the other until a picture is small enough: the share of its side, and WebP's quality.
_TRIES = ((1.0, 88), (1.0, 75), (0.8, 75), (0.65, 70), (0.5, 65), (0.35, 60), (0.25, 50))
_CAPTION_LENGTH = 120
#: Smaller pictures are shown this wide; up to so many pixels of their own each of these is a square.
_LEAST_SHOWN, _SQUARES = 192, 64


def fitted(image: Any, side: int, most_bytes: int) -> bytes:
    """A WebP file of a picture of PIL's: the longer side at most `side`, and in most_bytes if it can be.

    The last try is what it is: a quarter of the side.
    """
    data = b""
    for share, quality in _TRIES:
        copy = image.convert("RGB")
        copy.thumbnail((max(1, round(side * share)),) * 2)
        buffer = io.BytesIO()
        copy.save(buffer, "WEBP", quality=quality)
        data = buffer.getvalue()
        if len(data) <= most_bytes:
            break
    return data


def img(data: bytes, kind: str, words: str, width: int, css: str = "") -> str:
    """HTML of a picture.

    Args:
        data: the file.
        kind: "webp", "jpeg" or "png".
        words: for those who do not see it; untrusted.
        width: in the page, pixels; where there is less room it is smaller.
        css: a class for style sheets and tests.
    """
    alt = escape(printable(words), quote=True)
    look = f"max-width:100%;width:{width}px;height:auto"
    named = f' class="miinb-{css}"' if css else ""
    return f'<img{named} alt="{alt}" style="{look}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def shown(image: Any, words: str, side: int, most_bytes: int, css: str = "") -> str:
    """HTML of a picture of PIL's as `fitted` makes it; a small one is enlarged, a tiny one to squares."""
    data = fitted(image, side, most_bytes)
    width = shown_width(image, side)
    html = img(data, "webp", words, width, css)
    return html.replace('style="', 'style="image-rendering:pixelated;', 1) if in_squares(image) else html


def in_squares(image: Any) -> bool:
    """Whether a picture is so small that its pixels are shown as squares; of larger ones these would be uneven."""
    return bool(max(image.size) <= _SQUARES)


def shown_width(image: Any, side: int) -> int:
    """How wide `shown` shows a picture in the page, pixels."""
    longest: int = max(image.size)
    share: float = min(side, max(longest, _LEAST_SHOWN)) / longest
    return max(1, round(float(image.width) * share))


def caption(prompt: str, seed: int, flagged: bool = False) -> str:
    """A picture in a line of words."""
    words = shortened(one_line(prompt), _CAPTION_LENGTH) or "(no prompt)"
    return f"{words} · seed {seed}" + (" · made black by the model's safety checker" if flagged else "")
