"""PNG files hold the pixels and texts that they were given: Pillow reads them."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from miinb import png_files
from miinb.png_files import png_file


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (64, 48), (513, 511)])
@pytest.mark.parametrize("kind", ["noise", "flat", "view"])
def test_pillow_reads_what_was_written(size: tuple[int, int], kind: str) -> None:
    pixels = noise(*size)
    if kind == "flat":
        pixels[:] = (0, 255, 7)
    elif kind == "view":
        pixels = noise(2 * size[0], 3 * size[1])[::-2, ::3]
    texts = {"parameters": "a cat,\nand a dog 😀", "miinb": "{}", "empty": ""}
    with Image.open(io.BytesIO(png_file(pixels, texts))) as image:
        image.verify()  # every chunk's checksum
    with Image.open(io.BytesIO(png_file(pixels, texts))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", size[::-1])
        assert image.text == texts
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_parts_that_threads_deflate_are_one_stream(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png_files, "_PART_BYTES", 100)
    monkeypatch.setattr(png_files, "_THREADS", 4)
    pixels = noise(rows, 50)
    data = png_file(pixels, {})
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
    begin = data.index(b"IDAT") + 4
    assert len(zlib.decompress(data[begin : data.index(b"IEND") - 8])) == rows * 151  # its sum too


def test_a_smooth_picture_becomes_a_small_file() -> None:
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[:, None]), -1)
    assert len(png_file(pixels, {})) < pixels.size / 50
    assert len(png_file(noise(512, 512), {})) < 1.01 * pixels.size
