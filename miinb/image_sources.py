"""Pictures that others are made from, and masks: what is taken, their size, their pixels.

The client looks at what it sends, and the server at what it gets, with the same functions: files of strangers are read
by Pillow's PNG, JPEG and WebP readers alone, within limits of bytes and pixels.
"""

from __future__ import annotations

import io
from typing import Any

from miinb.errors import InvalidRequest
from miinb.image_messages import PaintSource, Source
from miinb.image_params import MAX_SIDE, SIDE_STEP, ImageParams

#: Bytes of a request's files together: a message of gRPC takes 16 MiB, the prompts too.
MAX_SOURCE_BYTES = 15 << 20
#: Pixels of a file: about 100 MB while it is made smaller.
MAX_SOURCE_PIXELS = 1 << 25
FORMATS = ("PNG", "JPEG", "WEBP")
#: From here on a mask's grey counts as white, as diffusers rounds it.
_WHITE = 128
#: Of proportions: how far a mask's may be from its picture's, as sides are whole and multiples of 8.
_SLACK = 0.02
_GIVE = "Give a PNG, JPEG or WebP file, or a PIL image."
_SMALLER = "Make it smaller before: image.thumbnail((2048, 2048)) of a PIL image."


def decoded(data: bytes, what: str) -> Any:
    """The PIL image of a file, read whole and turned upright as its EXIF says.

    Args:
        what: the option's name, for messages.

    Raises:
        InvalidRequest: it is another kind of file, broken, too large, or has several frames.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise InvalidRequest(f"{what}: the file is empty.", hint=_GIVE)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_pixels(image.size, what)
        # phones put small versions for screens behind a JPEG ("MPO"): the first frame is the picture
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise InvalidRequest(f"{what}: it has {frames} frames.", hint="Give one as a PIL image: image.seek(0).")
        image.load()
    except (InvalidRequest, MemoryError):
        raise
    except UnidentifiedImageError:
        raise InvalidRequest(f"{what}: it is no PNG, JPEG or WebP file.", hint=_GIVE) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequest(f"{what}: it has more than {MAX_SOURCE_PIXELS} pixels.", hint=_SMALLER) from None
    except Exception as error:  # whatever a reader makes of a broken file
        why = f"{error}" or type(error).__name__
        raise InvalidRequest(f"{what}: the file is broken ({why:.100}).", hint=_GIVE) from None
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be read says nothing
        return image


def _check_pixels(size: tuple[int, int], what: str) -> None:
    width, height = size
    if width * height > MAX_SOURCE_PIXELS:
        raise InvalidRequest(
            f"{what}: {width} x {height} are more than {MAX_SOURCE_PIXELS} pixels.", hint=_SMALLER
        ) from None


def rgb(image: Any, what: str) -> Any:
    """A PIL image in RGB; what is transparent in it lies on white, as on a page.

    Raises:
        InvalidRequest: its kind of pixels has no one meaning.
    """
    from PIL import Image

    image = _eight_bits(image, what)
    if not _is_transparent(image):
        return _converted(image, "RGB", what)
    image = _converted(image, "RGBA", what)
    page = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(page, image).convert("RGB")


def grey(mask: Any, what: str) -> Any:
    """A PIL mask in L. Raises InvalidRequest, as `rgb`, and where it is transparent somewhere."""
    mask = _eight_bits(mask, what)
    if _is_transparent(mask):
        raise InvalidRequest(
            f"{what}: it is transparent in places, which may mean either.",
            hint="Give white where to repaint and black elsewhere, as mask.convert('L') or mask.getchannel('A').",
        )
    return _converted(mask, "L", what)


def _eight_bits(image: Any, what: str) -> Any:
    """Greys of 16 bits made 8: Pillow would cut them off at 255."""
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("I", "F"):
        raise InvalidRequest(f"{what}: numbers of mode {image.mode!r} are no colors.", hint="Convert it to 'L' before.")
    return image


def _is_transparent(image: Any) -> bool:
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return False
    lowest, _ = _converted(image, "RGBA", "image").getchannel("A").getextrema()
    return bool(lowest < 255)


def _converted(image: Any, mode: str, what: str) -> Any:
    try:
        return (image.convert("LA") if image.mode == "La" else image).convert(mode)
    except (ValueError, OSError):
        raise InvalidRequest(
            f"{what}: mode {image.mode!r} cannot be made {mode}.", hint="Convert it to 'RGB' before."
        ) from None


def size_of(image: Any, params: ImageParams) -> tuple[int, int]:
    """Width and height, in pixels, of what is made from a picture: its own, rounded down to multiples of 8.

    Args:
        params: their `width` and `height` hold over the picture's.

    Raises:
        InvalidRequest: the picture is too small or too large for that.
    """
    width, height = (
        side or own - own % SIDE_STEP for side, own in zip((params.width, params.height), image.size, strict=True)
    )
    own = f"image: it is {image.size[0]} x {image.size[1]}"
    if min(width, height) < SIDE_STEP:
        raise InvalidRequest(f"{own}; at least {SIDE_STEP} x {SIDE_STEP} are needed.", hint="Give width= and height=.")
    if (largest := max(width, height)) > MAX_SIDE:
        fit = [max(SIDE_STEP, side * MAX_SIDE // largest // SIDE_STEP * SIDE_STEP) for side in image.size]
        raise InvalidRequest(
            f"{own}; at most {MAX_SIDE} pixels of a side are made.", hint=f"Give width={fit[0]}, height={fit[1]}."
        )
    return width, height


def sized(image: Any, size: tuple[int, int]) -> Any:
    """A PIL image of RGB or L in another size, as diffusers makes it."""
    from PIL import Image

    return image if image.size == size else image.resize(size, resample=Image.Resampling.LANCZOS)


def sized_mask(mask: Any, image: Any, size: tuple[int, int], what: str) -> Any:
    """A mask in L and the size of the work.

    Args:
        mask, image: PIL images.
        size: of the work.

    Raises:
        InvalidRequest: it has other proportions than the picture, or nothing of it is white.
    """
    (width, height), (columns, rows) = image.size, mask.size
    slack = _SLACK + SIDE_STEP / width + SIDE_STEP / height
    if abs(columns * height / (rows * width) - 1) > slack:
        raise InvalidRequest(
            f"{what}: {columns} x {rows} is no mask of a picture of {width} x {height}.",
            hint="Give one of the picture's size.",
        )
    found = sized(grey(mask, what), size)
    if found.getextrema()[1] < _WHITE:
        raise InvalidRequest(f"{what}: nothing of it is white.", hint="White is what is painted anew.")
    return found


def black_and_white(mask: Any) -> Any:
    """A mask of two colors, rounded as diffusers does: the same to it, and a smaller file."""
    return mask.point(lambda value: 255 if value >= _WHITE else 0).convert("1")


def pixels(image: Source, mask: Source | None, params: ImageParams) -> tuple[tuple[int, int], PaintSource]:
    """What a rank is told of files: the size of the work, and what they hold in that size.

    Raises:
        InvalidRequest: a file cannot be used.
    """
    check_bytes(image, mask)
    picture = decoded(image.data, "image")
    size = size_of(picture, params)
    cover = sized_mask(decoded(mask.data, "mask_image"), picture, size, "mask_image") if mask else None
    return size, PaintSource(sized(rgb(picture, "image"), size).tobytes(), cover.tobytes() if cover else b"")


def check_bytes(image: Source, mask: Source | None) -> None:
    """Raise InvalidRequest where files are larger than a message takes."""
    count = len(image.data) + (len(mask.data) if mask else 0)
    if count > MAX_SOURCE_BYTES:
        raise InvalidRequest(
            f"image: the files have more than {MAX_SOURCE_BYTES >> 20} MiB together.",
            hint="Give it as a PIL image: that is sent in the size that is needed.",
        )
