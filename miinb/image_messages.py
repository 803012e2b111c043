"""What flows between the processes for text-to-image; `messages.py` says how such messages are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miinb.image_params import ImageParams

# Client and frontend


@dataclass(frozen=True, slots=True)
class Source:
    """A picture that others are made from, or a mask: a PNG, JPEG or WebP file.

    Attributes:
        name: of the file, without folders; "" where it has none.
    """

    name: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ImagesRequest:
    """What a client asks: a prompt, and how many pictures of it.

    Attributes:
        request_id: chosen by the client, the same for all prompts of a call: whose turn it is to be computed.
        image: where to begin from, instead of from noise alone.
        mask: of that picture what is white here is painted anew, and the rest is kept.
    """

    prompt: str
    params: ImageParams
    request_id: str = ""
    image: Source | None = None
    mask: Source | None = None


@dataclass(frozen=True, slots=True)
class ImagesProgress:
    """How far a request's pictures are on average; of the first one a small JPEG, where previews were asked for."""

    step: int
    total: int
    preview: bytes = b""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a request.

    Attributes:
        index: its place among the request's.
        data: a PNG or WebP file, with what made it inside (`parameters`, as A1111 writes it, and JSON in `miinb`).
        seed: that makes it again.
        flagged: the model's safety checker found it unfit, and made it black.
    """

    index: int
    data: bytes
    seed: int
    width: int
    height: int
    flagged: bool = False


@dataclass(frozen=True, slots=True)
class ImageTimes:
    """Seconds of the server's work on a request's pictures; of several each is the largest.

    Attributes:
        queue_s: waiting for the batch before.
        text_encode_s: the text encoder's.
        steps_s: the denoising's, of the whole batch that a picture was in; with the VAE's look at what it began from.
        vae_s: making pixels of latents (and the safety checker's look at them), until a picture's were there.
        picture_s: making files of pixels.
    """

    queue_s: float = 0.0
    text_encode_s: float = 0.0
    steps_s: float = 0.0
    vae_s: float = 0.0
    picture_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ImagesEnd:
    """A request is complete.

    Attributes:
        times: of the server.
        prompt_tokens: of the prompt, the special ones included, those that were cut off not.
        cut: the end of the prompt that the model did not read, as it takes so few tokens; "": it read all.
        negative_cut: the same of the negative prompt.
        batch: most pictures that were computed together with one of these.
    """

    times: ImageTimes
    prompt_tokens: int
    cut: str = ""
    negative_cut: str = ""
    batch: int = 1


ImagesEvent = ImagesProgress | Picture | ImagesEnd

# Frontend and rank 0


@dataclass(frozen=True, slots=True)
class PaintSource:
    """Where pictures begin from, in the size that they are to have.

    Attributes:
        image: RGB, three bytes a pixel, row after row.
        mask: one byte a pixel, 128 and more where it is painted anew; b"": everywhere.
    """

    image: bytes = field(repr=False)
    mask: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class PaintRequest:
    """One picture for rank 0. A request for n of them is n of these, with seeds seed, seed + 1, ..."""

    row_id: int  # unique in the frontend's life
    prompt: str
    params: ImageParams  # seed is set; of one with a source width, height and strength too
    t_submit: float  # time.monotonic() when the frontend accepted the request
    deadline: float | None = None  # time.monotonic() after which it must not start
    source: PaintSource | None = None  # the rows of a request share it
    more: bool = False  # of its request are on their way: no batch begins before the last has come
    request_id: str = ""  # the client's: pictures of different ones are computed in turns


@dataclass(frozen=True, slots=True)
class PaintProgress:
    """How far a picture is, step 0 when it is begun; `preview` is RGB, three bytes a pixel, `width` of them a row."""

    row_id: int
    step: int
    total: int
    width: int = 0
    preview: bytes = b""


@dataclass(frozen=True, slots=True)
class PaintedEvent:
    """A picture is complete.

    Attributes:
        pixels: RGB, three bytes a pixel, row after row.
        facts: the fields of `ImagesEnd` of this picture alone: `cut`, `negative_cut`, `prompt_tokens`, `batch`.
        times: those of `ImageTimes` that rank 0 measures.
        schedule: of noise, by A1111's name, where the model's settings have one: "Karras".
    """

    row_id: int
    width: int
    height: int
    seed: int
    flagged: bool
    scheduler: str
    facts: Mapping[str, Any]
    times: Mapping[str, float]
    pixels: bytes | memoryview
    schedule: str = ""
