"""Numbers and sizes as people read them: the one way in which all of miinb writes them."""

from __future__ import annotations

import math

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
