"""How far two pictures lie apart: in numbers, in words, and as a picture. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from miinb.errors import InvalidValue
from miinb.wording import number

#: The largest value of a color.
_WHITE = 255


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two pictures of one size lie apart, over all pixels and colors.

    Attributes:
        largest: of 255.
        mean: of 255.
        psnr_db: peak signal to noise ratio in dB, 20 log10(255 / root of the mean square); infinity of equal pictures.
        changed: the share of pixels that are not equal, from 0 to 1.
    """

    largest: int
    mean: float
    psnr_db: float
    changed: float

    @property
    def equal(self) -> bool:
        """Pixel for pixel."""
        return self.largest == 0

    def __str__(self) -> str:
        if self.equal:
            return "The pictures are the same, pixel for pixel."
        share = "less than 0.1%" if self.changed < 0.001 else f"{number(100 * self.changed)}%"
        return (
            f"PSNR {self.psnr_db:.1f} dB; the largest difference is {self.largest} of 255, the mean one "
            f"{number(self.mean)}; {share} of the pixels differ."
        )


def difference(one: Any, other: Any) -> Difference:
    """How far two pictures of PIL's lie apart, in RGB.

    Raises:
        InvalidValue: their sizes differ.
    """
    import numpy

    _check_sizes(one, other)
    apart = _apart(one, other)
    square = float(numpy.mean(apart.astype(numpy.float64) ** 2))
    changed = float(numpy.mean(apart.any(axis=-1)))
    return Difference(int(apart.max()), float(apart.mean()), psnr_db(square), changed)


def psnr_db(mean_square: float) -> float:
    """Peak signal to noise ratio of a mean squared difference of values of 0 to 255, in dB; infinity of equal ones."""
    if math.isnan(mean_square):
        return math.nan
    return 10 * math.log10(_WHITE**2 / mean_square) if mean_square else math.inf


def difference_picture(one: Any, other: Any, gain: int = 1) -> Any:
    """A picture of PIL's of the distances of all colors, `gain` times as bright; black where the two are equal.

    Raises:
        InvalidValue: their sizes differ.
    """
    import numpy
    from PIL import Image

    _check_sizes(one, other)
    bright = numpy.minimum(_apart(one, other).astype(numpy.int32) * gain, _WHITE)
    return Image.fromarray(bright.astype(numpy.uint8), "RGB")


def _apart(one: Any, other: Any) -> Any:
    """Distances [height, width, 3] from 0 to 255."""
    import numpy

    left, right = (numpy.asarray(image.convert("RGB"), dtype=numpy.int16) for image in (one, other))
    return numpy.abs(left - right)


def _check_sizes(one: Any, other: Any) -> None:
    if one.size != other.size:
        sizes = " and ".join(f"{width} x {height}" for width, height in (one.size, other.size))
        raise InvalidValue(f"Pictures of {sizes} pixels cannot be compared.", hint="Take two of one size.")
