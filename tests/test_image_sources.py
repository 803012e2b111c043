"""Pictures that are given: what is taken of files and PIL images, and what is refused with what to do."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from miinb import image_asking, image_sources
from miinb.errors import InvalidRequest
from miinb.image_asking import image_requests
from miinb.image_messages import ImagesRequest, Source
from miinb.image_params import ImageParams


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def file_of(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(request: ImagesRequest) -> tuple[Image.Image, Image.Image | None]:
    """What the server makes of a request's files."""
    assert request.image is not None
    size, found = image_sources.pixels(request.image, request.mask, request.params)
    mask = Image.frombytes("L", size, found.mask) if found.mask else None
    return Image.frombytes("RGB", size, found.image), mask


def asked(image: Any, mask: Any = None, **params: Any) -> ImagesRequest:
    (request,) = image_requests("a", {"image": image, "mask_image": mask, **params})
    return request


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and np.array_equal(np.asarray(one), np.asarray(other))


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of a header and chunks, whatever they say."""
    made = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")):
        made += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return made


# What is taken


def test_files_travel_as_they_are_and_images_in_the_size_that_is_needed(tmp_path: Path) -> None:
    photo = noise(40, 27)
    path = tmp_path / "cat.jpg"
    photo.save(path)
    for given_ in (path, str(path)):
        assert asked(given_).image == Source("cat.jpg", path.read_bytes())
    assert asked(path.read_bytes()).image == Source("", path.read_bytes())
    request = asked(photo)
    assert request.image is not None
    assert Image.open(io.BytesIO(request.image.data)).size == (40, 24)
    expected = photo.resize((40, 24), Image.Resampling.LANCZOS)
    assert same(pixels(request)[0], expected)
    assert same(pixels(asked(file_of(photo)))[0], expected)
    assert same(pixels(asked(photo, width=16))[0], photo.resize((16, 24), Image.Resampling.LANCZOS))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_file_is_turned_upright_and_an_image_is_what_it_shows(tmp_path: Path) -> None:
    photo, exif = noise(16, 24), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    data = file_of(photo, exif=exif)
    assert same(pixels(asked(data))[0], photo.transpose(Image.Transpose.ROTATE_270))
    (tmp_path / "x.png").write_bytes(data)
    with Image.open(tmp_path / "x.png") as image:
        assert same(pixels(asked(image))[0], photo)
    broken = file_of(photo, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\1" * 9)
    assert pixels(asked(broken))[0].size == (16, 24)


@pytest.mark.parametrize(
    "made",
    [
        lambda image: image.convert("L"),
        lambda image: image.convert("1"),
        lambda image: image.convert("P"),
        lambda image: image.convert("CMYK"),
        lambda image: image.convert("YCbCr"),
    ],
    ids=["grey", "two colors", "palette", "CMYK", "YCbCr"],
)
def test_kinds_of_pixels_become_rgb(made: Callable[[Image.Image], Image.Image]) -> None:
    image = made(noise(16, 16))
    assert same(pixels(asked(image))[0], image.convert("RGB"))
    if image.mode not in ("CMYK", "YCbCr"):
        assert same(pixels(asked(file_of(image)))[0], image.convert("RGB"))


def test_greys_of_16_bits_are_not_cut_off() -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 256)
    expected = np.arange(256).reshape(16, 16)
    for given_ in (grey, file_of(grey)):
        found = np.asarray(pixels(asked(given_))[0])
        assert np.array_equal(found[:, :, 0], expected)
    with pytest.raises(InvalidRequest, match="'F'"):
        asked(Image.new("F", (16, 16)))


def test_what_is_transparent_lies_on_white() -> None:
    clear = Image.new("RGBA", (16, 16), (9, 0, 0, 0))
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    for image in (clear, half):
        expected = Image.alpha_composite(Image.new("RGBA", (16, 16), "white"), image).convert("RGB")
        assert same(pixels(asked(image))[0], expected)
        assert same(pixels(asked(file_of(image)))[0], expected)
    full = noise(16, 16, "RGB")
    assert same(pixels(asked(full.convert("RGBA")))[0], full)
    palette = full.convert("P")
    data = file_of(palette, transparency=palette.getpixel((0, 0)))
    assert pixels(asked(data))[0].getpixel((0, 0)) == (255, 255, 255)


def test_the_first_picture_of_a_phones_file_is_taken() -> None:
    photo, screen = noise(32, 32), noise(16, 16)
    data = file_of(photo, "MPO", save_all=True, append_images=[screen], quality=95)
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    assert pixels(asked(data))[0].size == (32, 32)


def test_masks_are_resized_as_pictures_are_and_rounded_at_the_half() -> None:
    photo, mask = noise(40, 24), noise(40, 24, "L")
    exact = np.asarray(pixels(asked(file_of(photo), file_of(mask), width=80, height=48))[1])
    assert np.array_equal(exact, np.asarray(mask.resize((80, 48), Image.Resampling.LANCZOS)))
    rounded = np.asarray(pixels(asked(photo, mask, width=80, height=48))[1])
    assert np.array_equal(rounded, np.where(exact >= 128, 255, 0))
    small = Image.new("L", (20, 12), 255)  # of another size, but of the same proportions
    assert np.asarray(pixels(asked(photo, small))[1]).min() == 255


def test_strengths_are_those_of_diffusers() -> None:
    photo, mask = noise(16, 16), Image.new("1", (16, 16), 1)
    assert asked(photo).params.strength == 0.8
    assert asked(photo, mask).params.strength == 1.0
    assert asked(photo, mask, strength=0.3).params.strength == 0.3
    (plain,) = image_requests("a", {})
    assert (plain.params.strength, plain.image) == (None, None)


# Lists


def test_one_for_all_prompts_or_one_for_each() -> None:
    photos = [noise(16, 16), noise(24, 16)]
    requests = image_requests(["a", "b"], {"image": photos, "negative_prompt": ["c", "d"], "num_images_per_prompt": 2})
    assert [pixels(request)[0].size for request in requests] == [(16, 16), (24, 16)]
    assert [request.params.negative_prompt for request in requests] == ["c", "d"]
    shared = image_requests(["a", "b", "c"], {"image": photos[0], "negative_prompt": "x"})
    assert shared[0].image is shared[1].image is shared[2].image
    assert {request.params.negative_prompt for request in shared} == {"x"}
    assert len({request.request_id for request in shared}) == 1  # of one call, which is one turn
    assert shared[0].request_id != requests[0].request_id
    assert len(image_requests(["a", "b"], {"image": photos[:1], "negative_prompt": ("x",)})) == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"negative_prompt": ["x"] * 3}, "negative_prompt: 3 for 2 prompts"),
        ({"negative_prompt": []}, "negative_prompt: the list is empty"),
        ({"negative_prompt": ["x", 3]}, r"negative_prompt\[1\]: int"),
        ({"negative_prompt": ["x", "y"], "guidance_scale": 1.0}, "guidance_scale above 1"),
        ({"image": [noise(16, 16)] * 3}, "image: 3 for 2 prompts"),
        ({"image": []}, "image: the list is empty"),
        ({"image": [noise(16, 16), b"junk"]}, r"^prompts\[1\]: image: it is no PNG"),
        ({"image": b"junk"}, "^image: it is no PNG"),
        ({"mask_image": noise(16, 16)}, "mask_image: acts only with a picture"),
        ({"strength": 0.5}, "strength: acts only with a picture"),
        ({"image": noise(16, 16), "strength": 0.01}, "strength: of 50 steps 0.01 is none"),
        ({"image": noise(16, 16), "strength": 0}, "is none"),
        ({"image": noise(16, 16), "strength": 1.5}, "strength"),
        ({"image": noise(16, 16), "num_inference_steps": 1}, "strength: of 1 steps 0.8 is none"),
        ({"mask": noise(16, 16)}, "mask_image"),
        ({"image": np.zeros((8, 8, 3))}, "ndarray is no picture"),
        ({"image": 3}, "int is no picture"),
        ({"image": "https://example.org/x.png"}, "addresses are not fetched"),
        ({"image": "/no/such/file.png"}, "No such file"),
        ({"image": "/"}, "cannot be read"),
        (
            {"image": "{nope}"},
            "{nope} cannot be read: No such .*Give a PNG, JPEG or WebP file; in a notebook {name}",
        ),
        ({"image": __file__}, "^image: test_image_sources.py: it is no PNG, JPEG or WebP file"),
        (
            {"xyzzy": 1},
            "'xyzzy'.* Known: .*, image, .*mask_image, .*on_progress, .*strength, timeout_s, ",
        ),
        ({"imgae": 1}, "Did you mean 'image'"),
        ({"scheduler": "Euler a"}, "'Euler a' is called EulerAncestralDiscreteScheduler here"),
        ({"scheduler": "ddim"}, "'ddim' is called DDIMScheduler here"),
        ({"scheduler": "x y"}, "scheduler: "),
        ({"image": b""}, "the file is empty"),
        ({"image": noise(7, 16)}, "at least 8 x 8"),
        ({"image": noise(4000, 30)}, "at most 2048"),
        ({"image": noise(16, 16), "height": 30}, "multiple of 8"),
        ({"image": noise(16, 16), "mask_image": noise(64, 16, "L")}, "64 x 16 is no mask of a picture of 16 x 16"),
        ({"image": noise(16, 16), "mask_image": Image.new("L", (16, 16), 127)}, "nothing of it is white"),
        ({"image": noise(16, 16), "mask_image": noise(16, 16, "RGBA")}, "transparent in places"),
        ({"image": noise(16, 16), "padding_mask_crop": 3}, "padding_mask_crop"),
    ],
)
def test_what_is_wrong_is_said(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        image_requests(["a", "b"], values)
    assert re.search(words, f"{refused.value.message} {refused.value.hint}"), refused.value


def test_a_size_that_fits_is_named() -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked(noise(4096, 3072))
    assert "width=2048, height=1536" in refused.value.hint
    assert pixels(asked(noise(4096, 3072), width=64, height=48))[0].size == (64, 48)


# Files of strangers: each is refused by the client, and by the server


def chunk_bomb() -> bytes:
    """Text of a few KB that would be gigabytes."""
    text = zlib.compress(b"a" * (200 << 20), 9)
    return png(8, 8, (b"zTXt", b"x\0\0" + text), (b"IDAT", zlib.compress(bytes(8 * 25))))


HOSTILE = {
    "text": (lambda: b"hello, world", "no PNG, JPEG or WebP"),
    "gif": (lambda: file_of(noise(8, 8), "GIF"), "no PNG, JPEG or WebP"),
    "tiff": (lambda: file_of(noise(8, 8), "TIFF"), "no PNG, JPEG or WebP"),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no PNG, JPEG or WebP"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no PNG, JPEG or WebP"),
    "a billion pixels": (lambda: png(100_000, 100_000, (b"IDAT", b"")), "more than"),
    "many pixels": (lambda: png(10_000, 10_000, (b"IDAT", b"")), "more than"),
    "a few too many": (lambda: png(8192, 4097, (b"IDAT", b"")), "8192 x 4097 are more than"),
    "png cut off": (lambda: file_of(noise(64, 64))[:-900], "broken"),
    "png without pixels": (lambda: png(8, 8), "broken"),
    "png with wrong pixels": (lambda: png(8, 8, (b"IDAT", b"junk")), "broken"),
    "png of no size": (lambda: png(0, 8, (b"IDAT", zlib.compress(b""))), "image: "),
    "text bomb": (chunk_bomb, "broken"),
    "jpeg cut off": (lambda: file_of(noise(64, 64), "JPEG")[:-900], "broken"),
    "jpeg's first bytes": (lambda: b"\xff\xd8\xff\xe0", "image: "),
    "webp cut off": (lambda: file_of(noise(64, 64), "WEBP")[:-90], "image: "),
    "animated webp": (
        lambda: file_of(noise(8, 8), "WEBP", save_all=True, append_images=[noise(9, 9).resize((8, 8))]),
        "2 frames",
    ),
    "animated png": (
        lambda: file_of(noise(8, 8), save_all=True, append_images=[noise(9, 9).resize((8, 8))]),
        "2 frames",
    ),
    "empty": (lambda: b"", "empty"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("made", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused_on_both_sides(made: Callable[[], bytes], words: str) -> None:
    data, photo = made(), file_of(noise(16, 16))
    with pytest.raises(InvalidRequest, match=words) as refused:
        asked(data)
    assert refused.value.hint
    with pytest.raises(InvalidRequest, match=words):
        image_sources.pixels(Source("", data), None, ImageParams())
    with pytest.raises(InvalidRequest, match=words.replace("image: ", "mask_image: ")):
        image_sources.pixels(Source("", photo), Source("", data), ImageParams())


def test_too_many_bytes_are_refused_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, mask = file_of(noise(64, 64)), file_of(Image.new("L", (64, 64), 255))
    (tmp_path / "large.png").write_bytes(data)
    for module in (image_sources, image_asking):
        monkeypatch.setattr(module, "MAX_SOURCE_BYTES", len(data))
    assert asked(data)
    assert asked(tmp_path / "large.png")
    for given_ in ({"image": data, "mask": mask}, {"image": data + b"\0"}):
        with pytest.raises(InvalidRequest, match="MiB") as refused:
            asked(**given_)
        assert "PIL" in refused.value.hint
    with pytest.raises(InvalidRequest, match="MiB"):
        image_sources.pixels(Source("", data), Source("", mask), ImageParams())


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "it is no file"),
        (tmp_path, "it is no file"),
        (tmp_path / "x", "No such file"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            asked(path)


def test_an_image_that_cannot_be_read_is_no_matter_of_its_mode(tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(file_of(noise(64, 64))[:2000])
    noise(16, 16).save(tmp_path / "whole.png")
    closed = Image.open(tmp_path / "whole.png")
    closed.close()
    for image in (Image.open(tmp_path / "half.png"), closed):
        with pytest.raises(InvalidRequest, match="image: the PIL image cannot be read"):
            asked(image)
        with pytest.raises(InvalidRequest, match="mask_image: the PIL image cannot be read"):
            asked(noise(16, 16), image)


def test_text_in_a_file_stays_out_of_what_is_sent(tmp_path: Path) -> None:
    """A PIL image's own notes (a place, a camera) are not sent."""
    info = PngImagePlugin.PngInfo()
    info.add_text("secret", "where it was taken")
    profile = b"icc profile of a camera"
    path = tmp_path / "x.png"
    noise(16, 16).save(path, pnginfo=info, icc_profile=profile, transparency=(1, 2, 3))
    with Image.open(path) as image:
        image.load()
        request = asked(image)
    assert request.image is not None
    assert b"taken" not in request.image.data
    assert set(Image.open(io.BytesIO(request.image.data)).info) == set()


@given(st.binary(max_size=300), st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(8, 200))
@settings(max_examples=150, deadline=None)
def test_junk_is_a_picture_or_an_invalid_request(junk: bytes, form: str, at: int) -> None:
    whole = file_of(noise(8, 8), form)
    with contextlib.suppress(InvalidRequest):
        image_sources.pixels(Source("", whole[:at] + junk + whole[at + len(junk) :]), None, ImageParams())
