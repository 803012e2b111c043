"""What comes of a request for pictures on the client's side: the answer, its times, its row of the table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from miinb.errors import Cancelled, DeadlineExceeded, MiinbError
from miinb.image_messages import ImagesEnd, ImagesRequest, Picture
from miinb.image_params import steps_of
from miinb.image_results import ImageResult, ImageTiming, pictures_result
from miinb.messages import Usage

#: Of what a prompt was cut, so much is told.
_SHOWN = 60


class Answer:
    """What has come of a request. Pictures are hashed as they come, while the server makes others or its end.

    Attributes:
        pictures: up to the first that has not come.
        begun: something has come.
        end: what came last.
        result: once all is there.
    """

    def __init__(self) -> None:
        self.pictures: list[Picture] = []
        self.begun = False
        self.end: ImagesEnd | None = None
        self.result: ImageResult | None = None
        self._sha256 = hashlib.sha256()
        self._early: dict[int, Picture] = {}

    def add(self, picture: Picture) -> None:
        """A picture, in any order."""
        self._early[picture.index] = picture
        while (following := self._early.pop(len(self.pictures), None)) is not None:
            self.pictures.append(following)
            self._sha256.update(following.data)

    @property
    def done(self) -> list[Picture]:
        """All that have come, in order; some may miss between them."""
        early = list(self._early.values())  # at once: more may come in another thread
        return [*self.pictures, *sorted(early, key=lambda picture: picture.index)]

    @property
    def complete(self) -> bool:
        """Whether its end has come, and all pictures up to the last."""
        return self.end is not None and bool(self.pictures) and not self._early

    @property
    def sha256(self) -> str:
        """Of the pictures' files one after another."""
        return self._sha256.hexdigest()


def so_far(prompt: str, answer: Answer, seconds: float) -> ImageResult | None:
    """The pictures that have come of a request without an end; None: none has, or a file cannot be read."""
    if not (done := answer.done):
        return None
    timing = ImageTiming(e2e_s=seconds, s_per_image=seconds / len(done))
    try:
        return pictures_result(prompt, done, timing, usage=Usage())
    except OSError:  # PIL's, of a file that is none; what the request failed of is to be told
        return None


def timing_of(end: ImagesEnd, e2e_s: float, count: int) -> ImageTiming:
    """Where the time of so many pictures went."""
    times = end.times
    return ImageTiming(
        queue_s=times.queue_s,
        model_s=times.text_encode_s + times.steps_s + times.vae_s,
        e2e_s=e2e_s,
        text_encode_s=times.text_encode_s,
        steps_s=times.steps_s,
        vae_s=times.vae_s,
        picture_s=times.picture_s,
        s_per_image=e2e_s / count,
    )


def warnings_of(end: ImagesEnd) -> Iterable[str]:
    """What of the prompts was not read."""
    for name, cut in (("prompt", end.cut), ("negative_prompt", end.negative_cut)):
        if cut:
            shown = cut if len(cut) <= _SHOWN else cut[: _SHOWN - 1] + "…"
            yield f"{name}: too long for the model, which did not read its end: {shown!r}"


def row_of(
    request: ImagesRequest,
    answer: Answer,
    error: MiinbError | None,
    e2e_s: float,
) -> dict[str, Any]:
    """The row of the requests table; a field that does not apply is left out."""
    params, pictures, end = request.params, answer.pictures, answer.end if answer.complete else None
    cancelled = end is None and (error is None or isinstance(error, Cancelled))
    failed = "cancelled" if cancelled else "timeout" if isinstance(error, DeadlineExceeded) else "error"
    row: dict[str, Any] = {
        "status": "ok" if end else failed,
        "e2e_s": e2e_s,
        "steps": steps_of(params),
        "guidance": params.guidance_scale,
        "seed": pictures[0].seed if pictures else params.seed,
    }
    if error is not None:
        row["error"] = type(error).__name__
    if end is None:
        return row
    times = end.times
    return row | {
        "images": len(pictures),
        "image_s": e2e_s / len(pictures),
        "width_px": pictures[0].width,
        "height_px": pictures[0].height,
        "prompt_tokens": end.prompt_tokens,
        "queue_s": times.queue_s,
        "preprocess_s": times.text_encode_s,
        "text_encode_s": times.text_encode_s,
        "steps_s": times.steps_s,
        "step_s": times.steps_s / steps_of(params),
        "vae_s": times.vae_s,
        "model_s": times.text_encode_s + times.steps_s + times.vae_s,
        "postprocess_s": times.picture_s,
        "finish_reason": "stop",
        "output_sha256": answer.sha256,
    }
