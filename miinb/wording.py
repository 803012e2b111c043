"""Numbers and sizes as people read them: the one way in which all of miinb writes them."""

from __future__ import annotations

import math

#: Control characters as visible pictures: model text must not drive a terminal.
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_CONTROL |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_JOINERS = "\u200c\u200d"  # some scripts need them

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def number(value: float, missing: str = "-") -> str:
    """Three significant digits without exponents: 0.0123, 1.23, 12.3, 123, 12,345; `missing` for NaN and infinity."""
    if not math.isfinite(value):
        return missing
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    return f"{value:,.0f}" if magnitude >= 2 else f"{value:.{min(2 - magnitude, 6)}f}"


def size_words(count: float) -> str:
    """Bytes in decimal units, as disks and GPUs are sold: 0 bytes, 2.05 kB, 269 MB, 1.71 GB."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{number(count / unit)} {name}"
    return f"{count:.0f} bytes"


def printable(text: str) -> str:
    """Text without characters that a terminal would act on (line ends and tabs stay)."""
    return text.translate(_CONTROL)


def one_line(text: str) -> str:
    """A name in one line: what controls a terminal or the direction of writing becomes U+FFFD."""
    kept = " ".join(text.split())
    return "".join(char if char.isprintable() or char in _JOINERS else "\ufffd" for char in kept)


def shortened(text: str, longest: int = 32) -> str:
    """Text of at most so many characters: the middle of a longer one is "…"."""
    if len(text) <= longest:
        return text
    tail = (longest - 1) // 2
    return f"{text[: longest - 1 - tail]}…{text[len(text) - tail :]}"
