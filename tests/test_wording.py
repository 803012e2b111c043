"""Numbers and sizes in words."""

from __future__ import annotations

import math

from miinb.wording import number, size_words


def test_numbers_have_three_significant_digits() -> None:
    values = (0.012345, 0.5, 1.234, 12.34, 123.4, 12345.6, 0, math.nan)
    assert [number(value) for value in values] == ["0.0123", "0.500", "1.23", "12.3", "123", "12,346", "0", "-"]
    assert number(math.inf, "") == ""


def test_sizes_are_decimal() -> None:
    sizes = (0, 999, 2048, 269_000_000, 1_710_000_000, 83_750_000_000)
    assert [size_words(count) for count in sizes] == ["0 bytes", "999 bytes", "2.05 kB", "269 MB", "1.71 GB", "83.8 GB"]
