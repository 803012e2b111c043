from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from miinb.errors import InvalidValue
from miinb.image_difference import difference, difference_picture


def plain(value: int, size: tuple[int, int] = (4, 2)) -> Image.Image:
    return Image.new("RGB", size, (value,) * 3)


def test_equal_pictures_say_so() -> None:
    apart = difference(plain(7), plain(7))
    assert apart.equal
    assert (apart.largest, apart.mean, apart.changed) == (0, 0.0, 0.0)
    assert math.isinf(apart.psnr_db)
    assert str(apart) == "The pictures are the same, pixel for pixel."


def test_numbers_are_those_of_their_definitions() -> None:
    other = plain(100)
    other.putpixel((0, 0), (110, 100, 95))
    apart = difference(plain(100), other)
    assert apart.largest == 10
    assert apart.mean == pytest.approx(15 / 24)
    assert apart.changed == 1 / 8
    assert apart.psnr_db == pytest.approx(10 * math.log10(255**2 / (125 / 24)))
    assert "PSNR 41.0 dB; the largest difference is 10 of 255" in str(apart)
    assert "12.5% of the pixels differ" in str(apart)


def test_black_and_white_are_0_db_apart() -> None:
    apart = difference(plain(0), plain(255))
    assert (apart.largest, apart.psnr_db, apart.changed) == (255, 0.0, 1.0)


def test_the_picture_of_a_difference_is_as_bright_as_asked() -> None:
    found = np.asarray(difference_picture(plain(10), plain(40), gain=4))
    assert found.shape == (2, 4, 3)
    assert (found == 120).all()
    assert (np.asarray(difference_picture(plain(10), plain(240), gain=64)) == 255).all()
    assert (np.asarray(difference_picture(plain(9), plain(9), gain=64)) == 0).all()


def test_gray_pictures_are_compared_as_colors() -> None:
    assert difference(plain(5), Image.new("L", (4, 2), 6)).largest == 1


def test_two_sizes_are_refused() -> None:
    with pytest.raises(InvalidValue, match="4 x 2 and 2 x 4 pixels"):
        difference(plain(0), plain(0, (2, 4)))
    with pytest.raises(InvalidValue):
        difference_picture(plain(0), plain(0, (2, 4)))
