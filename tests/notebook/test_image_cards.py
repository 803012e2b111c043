from __future__ import annotations

import dataclasses
import io
import re
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image

from miinb.image_results import ImageResult, ImageTiming
from miinb.messages import Usage
from miinb.notebook.image_cards import MOST_BYTES, images_card, images_line
from miinb.notebook.inline import fitted, shown, shown_width


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def result(image: Image.Image, count: int) -> ImageResult:
    same = {"images": (image,) * count, "prompts": ("a cat",) * count, "flagged": (False,) * count}
    return ImageResult((), ("stop",) * count, Usage(), seeds=tuple(range(count)), **same)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 5, 18])
def test_a_card_of_many_pictures_is_small(count: int) -> None:
    html, text = images_card(result(noise(320, 320), count))
    assert html.count("<img ") == min(count, 16)
    assert len(html) < 1.4 * MOST_BYTES
    assert ("2 more in .images" in html) == (count == 18)
    assert text.count("a cat") == count


def test_a_picture_keeps_its_shape_and_stays_within_its_bytes() -> None:
    image = noise(200, 400)
    data = fitted(image, 300, 20_000)
    assert len(data) <= 20_000
    with Image.open(io.BytesIO(data)) as small:
        assert small.height == 2 * small.width
    assert len(fitted(image, 300, 1_000_000)) > 20_000


@pytest.mark.parametrize(
    ("size", "side", "width"),
    [((512, 768), 512, 341), ((64, 64), 512, 192), ((128, 96), 512, 192), ((300, 200), 512, 300)],
)
def test_pictures_are_shown_as_wide_as_they_are_and_tiny_ones_enlarged(
    size: tuple[int, int], side: int, width: int
) -> None:
    image = Image.new("RGB", size)
    assert shown_width(image, side) == width
    html = shown(image, "x", side, 100_000)
    assert f"width:{width}px" in html
    assert ("pixelated" in html) == (max(size) <= 64)
    (data,) = re.findall(r"base64,([^\"]*)", html)
    assert Image.open(io.BytesIO(b64decode(data))).format == "WEBP"


def test_of_times_what_was_measured_is_told() -> None:
    timing = ImageTiming(e2e_s=2.0, s_per_image=2.0, steps_s=1.5, vae_s=0.044)
    assert images_line(dataclasses.replace(result(noise(8, 8), 1), timing=timing)) == (
        "1 image · 2.00 s in all · steps 1.50 s, VAE 44 ms"
    )
