"""What a painter is, and what it is asked for: the work of a batch, and where each of its pictures begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from miinb.engine.previews import LatentColors
from miinb.errors import InvalidRequest, NonFinite
from miinb.image_messages import PaintRequest
from miinb.image_params import steps_done

#: What a picture is made of: a text, a picture and a text, or the white places of a mask over a picture and a text.
Kind = Literal["text", "image", "inpaint"]


@dataclass(frozen=True, slots=True)
class Work:
    """What the pictures of a batch have in common."""

    width: int
    height: int
    steps: int
    guidance: float
    scheduler: str  # a class of diffusers
    strength: float = 1.0
    kind: Kind = "text"

    @property
    def done(self) -> int:
        """Steps that are done."""
        return steps_done(self.steps, self.strength)


@dataclass(frozen=True, slots=True)
class Start:
    """Where one picture begins: noise of its seed, and what that is laid on.

    Attributes:
        image: of kinds "image" and "inpaint": RGB, three bytes a pixel, of the work's size.
        mask: of kind "inpaint": one byte a pixel, 128 and more where it is painted anew.
    """

    seed: int
    image: bytes = b""
    mask: bytes = b""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text encoder reads of a text: its tokens, and the end that does not fit ("": all fits)."""

    tokens: int
    cut: str


#: A picture's pixels, RGB, row after row, and whether it was found unfit; or what is said of NaN and infinity.
Decoded = tuple[bytes, bool] | NonFinite


class Painter(Protocol):
    """Computes pictures.

    Attributes:
        scheduler: the class of the model's own scheduler.
        schedulers: classes that may stand in for it, its own too.
        width, height: of a picture unless a request says, in pixels.
        kinds: of work that it can do.
        colors: what a preview makes of its latents.
    """

    kinds: Sequence[Kind]
    colors: LatentColors
    scheduler: str
    schedulers: Sequence[str]
    width: int
    height: int

    def check(self, work: Work) -> None:
        """Refuse what its scheduler cannot do. Raises InvalidRequest."""

    def noise_schedule(self, scheduler: str) -> str:
        """A1111's name of what spaces its noise, where the model's settings name it: "Karras"; else ""."""

    def read(self, text: str) -> Reading:
        """What the text encoder reads of a text."""

    def embed(self, prompts: Sequence[str], negatives: Sequence[str], guidance: float) -> Any:
        """The conditions of a batch, for `denoise`."""

    def denoise(
        self, conditions: Any, work: Work, starts: Sequence[Start], between: Callable[[int, Tensor], None]
    ) -> Tensor:
        """Latents [N, C, h, w] of the starts; `between` gets each step's number, from 1, and its latents."""

    def decode(self, latents: Tensor) -> list[Decoded]:
        """The pictures of latents [N, C, h, w]."""

    def close(self) -> None:
        """Let go of the device's memory."""


def work_of(request: PaintRequest, painter: Painter, scheduler: str) -> Work:
    """The work of a picture. Raises InvalidRequest where its painter has no such kind."""
    params, source = request.params, request.source
    kind: Kind = "text" if source is None else "inpaint" if source.mask else "image"
    if kind not in painter.kinds:
        raise InvalidRequest(f"This model does not {_DOES[kind]}.", hint=_ASKS[painter.kinds[0]])
    size = (params.width or painter.width, params.height or painter.height)
    strength = 1.0 if params.strength is None else params.strength
    return Work(*size, params.num_inference_steps, params.guidance_scale, scheduler, strength, kind)


_DOES: Mapping[Kind, str] = {
    "text": "make pictures of a text alone",
    "image": "change whole pictures",
    "inpaint": "paint parts of a picture anew",
}
#: What to give for each kind.
_ASKS: Mapping[Kind, str] = {
    "text": "Leave image= and mask_image= out.",
    "image": "Give image=, and no mask.",
    "inpaint": "Give image= and mask_image=: it paints anew what is white there.",
}


def start_of(request: PaintRequest) -> Start:
    """Where a picture begins."""
    seed, source = request.params.seed or 0, request.source
    return Start(seed) if source is None else Start(seed, source.image, source.mask)
