"""What a request for pictures gives: `ImageResult`, a `Result` with PIL images and their seeds."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miinb.errors import InvalidRequest
from miinb.image_messages import Picture
from miinb.messages import Timing, Usage
from miinb.results import Result

#: Hint of the error of a call that ended early: where the pictures are that were done.
KEPT = "What is done is in this error's .result (in a notebook: sys.last_value.result)."


@dataclass(frozen=True, slots=True)
class ImageTiming(Timing):
    """Where the time of pictures went, in seconds; of several prompts each is the largest.

    `model_s` is the sum of the next three. Those are of the batch that a picture was computed in, with the pictures of
    other requests; `vae_s` ends with the last picture's pixels. `picture_s` is making files of pixels, `s_per_image` is
    `e2e_s` over the number of pictures.
    """

    text_encode_s: float = 0.0
    steps_s: float = 0.0
    vae_s: float = 0.0
    picture_s: float = 0.0
    s_per_image: float = 0.0


@dataclass(frozen=True, slots=True)
class ImageResult(Result):
    """Pictures of one prompt or several: prompts in order, and the pictures of a prompt in order.

    Attributes:
        images: PIL images.
        files: the same as PNG or WebP files, with the parameters inside.
        seeds: one a picture; with it and the same parameters the picture can be made again.
        prompts: one a picture.
        flagged: one a picture: the model's safety checker found it unfit, and made it black.
        warnings: what of the prompts was not read.
        saved: what `save` has written.
    """

    timing: ImageTiming = field(default_factory=ImageTiming)
    files: tuple[bytes, ...] = field(default=(), repr=False)
    prompts: tuple[str, ...] = ()
    flagged: tuple[bool, ...] = ()
    warnings: tuple[str, ...] = ()
    saved: list[Path] = field(default_factory=list, repr=False, compare=False)

    def save(self, folder: str | Path = ".") -> list[Path]:
        """Write each picture to `<seed>.png` (or .webp) in a folder, which is made; a name that is taken gets a number.

        Raises:
            InvalidRequest: it cannot be written there.
        """
        place = writable(folder)
        try:
            paths = [_write(place, str(seed), data) for seed, data in zip(self.seeds, self.files, strict=True)]
        except OSError as error:
            raise _unwritten(place, error) from None
        self.saved.extend(paths)
        return paths

    def __str__(self) -> str:
        from miinb.notebook.image_cards import images_text

        return images_text(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from miinb.notebook.cards import bundle
        from miinb.notebook.image_cards import images_card

        return bundle(images_card(self))


@dataclass(frozen=True, slots=True)
class ImageReply:
    """Answer of `query` for text-to-image, with the fields of MII's `Txt2ImgReply`, and more.

    Attributes:
        images: PIL images, in the order of the prompts.
        nsfw_content_detected: one a picture: the model's safety checker found it unfit, and made it black.
        time_taken: seconds on the client's clock.
        model_time_taken: seconds in the model.
        seeds: one a picture.
    """

    images: list[Any]
    nsfw_content_detected: list[bool]
    time_taken: float
    model_time_taken: float
    seeds: list[int]


def writable(folder: str | Path) -> Path:
    """A folder for pictures, which is made.

    Raises:
        InvalidRequest: nothing can be written there.
    """
    place = Path(folder).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileExistsError:
        raise InvalidRequest(f"The pictures cannot be written to {place}: it is no folder.") from None
    except OSError as error:
        raise _unwritten(place, error) from None
    return place


def _unwritten(place: Path, error: OSError) -> InvalidRequest:
    return InvalidRequest(f"The pictures cannot be written to {place}: {error.strerror or error}.")


def _write(folder: Path, name: str, data: bytes) -> Path:
    ending = "webp" if data[:4] == b"RIFF" else "png"
    number = 1
    while True:
        file = folder / (f"{name}.{ending}" if number == 1 else f"{name}-{number}.{ending}")
        try:
            stream = file.open("xb")
        except FileExistsError:
            number += 1
            continue
        try:
            with stream:
                stream.write(data)
        except BaseException:
            file.unlink(missing_ok=True)  # a full disk: half a picture is none
            raise
        return file


def pictures_result(prompt: str, pictures: Sequence[Picture], timing: ImageTiming, **values: Any) -> ImageResult:
    """The result of one prompt; `values` are further fields."""
    from PIL import Image

    images = [Image.open(io.BytesIO(picture.data)) for picture in pictures]  # Pillow decodes them at their first use
    return ImageResult(
        texts=(),
        finish_reasons=tuple("stop" for _ in pictures),
        timing=timing,
        seeds=tuple(picture.seed for picture in pictures),
        images=tuple(images),
        files=tuple(picture.data for picture in pictures),
        prompts=(prompt,) * len(pictures),
        flagged=tuple(picture.flagged for picture in pictures),
        **values,
    )


def merge_images(results: Sequence[ImageResult]) -> ImageResult:
    """Results of several prompts, asked together, as one."""
    if len(results) == 1:
        return results[0]
    times = {name: max(getattr(result.timing, name) for result in results) for name in _TIMES}
    times["s_per_image"] = times["e2e_s"] / sum(len(result.images) for result in results)
    joined: dict[str, Any] = {}
    for name in _JOINED:
        joined[name] = tuple(one for result in results for one in getattr(result, name))
    tokens = sum(result.usage.prompt_tokens for result in results)
    warnings = [
        f"prompts[{place}]: {text.removeprefix('prompt: ')}"
        for place, result in enumerate(results)
        for text in result.warnings
    ]
    return ImageResult(
        texts=(), usage=Usage(prompt_tokens=tokens), timing=ImageTiming(**times), warnings=tuple(warnings), **joined
    )


_TIMES = (*Timing.__slots__, *ImageTiming.__slots__)
_JOINED = ("finish_reasons", "seeds", "rows", "images", "files", "prompts", "flagged")
