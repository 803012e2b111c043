"""Pictures as arrays of pixels, and how far two of them differ. Pure; `image_difference` has PIL's pictures."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def pixels_of(file: bytes) -> Pixels:
    """The picture of a PNG or WebP file as [height, width, 3]."""
    from PIL import Image

    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def difference(one: Pixels, other: Pixels) -> tuple[float, int]:
    """Mean squared difference of the values of two pictures of one size, and the largest difference (0 to 255).

    Raises:
        ValueError: they have not one size.
    """
    if one.shape != other.shape:
        raise ValueError(f"pictures of {one.shape} and {other.shape}")
    apart = one.astype(np.int32) - other.astype(np.int32)
    return float(np.mean(np.square(apart, dtype=np.float64))), int(np.abs(apart).max())


def psnr_words(db: float) -> str:
    """ "48.2 dB"; "identical" of pictures without a difference."""
    return "identical" if math.isinf(db) else f"{db:.1f} dB"
