"""What a user gives for pictures, made into requests: prompts, negative prompts, pictures to begin from, masks."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from miinb.errors import InvalidRequest
from miinb.image_messages import ImagesRequest, Source
from miinb.image_params import ImageParams, parse_images, with_strength
from miinb.image_sources import (
    MAX_SOURCE_BYTES,
    black_and_white,
    check_bytes,
    decoded,
    rgb,
    size_of,
    sized,
    sized_mask,
)

_GIVE = "Give a PNG, JPEG or WebP file (its path or bytes), or a PIL image; of an array PIL.Image.fromarray(array)."
_NO_VARIABLE = "Give a PNG, JPEG or WebP file; in a notebook {name} is a picture, where there is such a variable."


def image_requests(prompts: Any, parameters: Mapping[str, Any]) -> list[ImagesRequest]:
    """One request for each prompt, all of the same id. Reads and checks the pictures that are given.

    Args:
        prompts: one prompt or several.
        parameters: `ImageParams`; `image` and `mask_image`: a PIL image, a path or a file's bytes for all prompts, or
            a list of one for each; `negative_prompt` may be such a list too. A mask's white is painted anew; what is
            black is kept but for what the VAE's encoding and decoding change, as in diffusers.

    Raises:
        InvalidRequest: there is no prompt, or one is no text; or a parameter or a picture is wrong.
    """
    if not isinstance(prompts, Iterable) or isinstance(prompts, (Mapping, Set, bytes)):
        hint = "query() takes a dictionary." if isinstance(prompts, Mapping) else "Give a text or a list of texts."
        raise InvalidRequest(f"prompts: {type(prompts).__name__} is not text.", hint=hint)
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise InvalidRequest("prompts: the list is empty.")
    for place, prompt in enumerate(given):
        if not isinstance(prompt, str):
            raise InvalidRequest(f"prompts[{place}]: {type(prompt).__name__} is not text.")
    shared = dict(parameters)
    images, masks, negatives = (_each(name, shared.pop(name, None), len(given)) for name in _LISTS)
    made = [parse_images({**shared, "negative_prompt": negative}) for negative in negatives]
    return _requests(given, made, images, masks)


#: What may be a list with one for each prompt.
_LISTS = ("image", "mask_image", "negative_prompt")


def _each(name: str, value: Any, count: int) -> Sequence[Any]:
    """One for each prompt."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if not value:
        raise InvalidRequest(f"{name}: the list is empty.", hint=f"Leave {name} out.")
    if name == "negative_prompt":
        for place, text in enumerate(value):
            if not isinstance(text, str):
                raise InvalidRequest(f"negative_prompt[{place}]: {type(text).__name__} is not text.")
    if len(value) not in (1, count):
        raise InvalidRequest(
            f"{name}: {len(value)} for {count} prompt{'s' * (count != 1)}.", hint="Give one for all, or one for each."
        )
    return list(value) * (count // len(value))


def _requests(
    prompts: Sequence[str], parameters: Sequence[ImageParams], images: Sequence[Any], masks: Sequence[Any]
) -> list[ImagesRequest]:
    requests, request_id = [], uuid.uuid4().hex
    read: tuple[Any, ...] = ()
    sources: tuple[Source | None, Source | None] = (None, None)
    shared = all(image is images[0] for image in images) and all(mask is masks[0] for mask in masks)
    for place, (prompt, params, image, mask) in enumerate(zip(prompts, parameters, images, masks, strict=True)):
        full = with_strength(params, image=image is not None, mask=mask is not None)
        if image is not None and not (read and read[0] is image and read[1] is mask):  # what all share is read once
            try:
                sources, read = _sources(image, mask, full), (image, mask)
            except InvalidRequest as error:
                raise (error if shared else error.of(f"prompts[{place}]")) from None
        pair = sources if image is not None else (None, None)
        requests.append(ImagesRequest(prompt, full, request_id, *pair))
    return requests


def _sources(image: Any, mask: Any, params: ImageParams) -> tuple[Source, Source | None]:
    """Both as files that travel: those that are files as they are, PIL images in the size that is needed."""
    picture, file = _picture(image, "image")
    size = size_of(picture, params)
    flat = rgb(picture, "image")  # of a file too, so that its kind is refused here
    source = file or Source("", _png(sized(flat, size)))
    if mask is None:
        check_bytes(source, None)
        return source, None
    cut, file = _picture(mask, "mask_image")
    found = sized_mask(cut, picture, size, "mask_image")
    cover = file or Source("", _png(black_and_white(found)))
    check_bytes(source, cover)
    return source, cover


def _picture(value: Any, what: str) -> tuple[Any, Source | None]:
    """The PIL image of what was given, and the file where it is one."""
    from PIL import Image

    if isinstance(value, Image.Image):
        try:
            value.load()  # of a file that Pillow has only looked at
        except Exception as error:  # whatever a reader makes of a broken file, or of a closed one
            raise InvalidRequest(
                f"{what}: the PIL image cannot be read ({error!s:.100}).", hint="Open its file again."
            ) from None
        return value, None
    if isinstance(value, (bytes, bytearray, memoryview)):
        source = Source("", bytes(value))
    elif isinstance(value, (str, os.PathLike)):
        source = _file(os.fspath(value), what)
    else:
        raise InvalidRequest(f"{what}: {type(value).__name__} is no picture.", hint=_GIVE)
    if len(source.data) > MAX_SOURCE_BYTES:
        check_bytes(source, None)
    return decoded(source.data, f"{what}: {source.name}" if source.name else what), source


def _file(text: str | bytes, what: str) -> Source:
    if "://" in os.fsdecode(text):
        raise InvalidRequest(f"{what}: addresses are not fetched.", hint="Download it, and give its path.")
    path = Path(os.fsdecode(text))
    try:
        path = path.expanduser()
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with path.open("rb") as stream:
            data = stream.read(MAX_SOURCE_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        hint = _NO_VARIABLE if path.name[:1] + path.name[-1:] == "{}" else _GIVE
        raise InvalidRequest(f"{what}: {path} cannot be read: {why}.", hint=hint) from None
    return Source(path.name.encode("utf-8", "replace").decode(), data)


def _png(image: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    bare = Image.frombytes(image.mode, image.size, image.tobytes())  # without notes of its own: a place, a camera
    bare.save(buffer, "PNG", compress_level=1)  # it goes to this machine mostly
    return buffer.getvalue()
