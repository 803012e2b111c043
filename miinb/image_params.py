"""What a user can set of a request for pictures: diffusers' names and meanings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from miinb.config import MAX_SEED
from miinb.errors import InvalidRequest, did_you_mean, near
from miinb.frozen import Frozen, InvalidValueError
from miinb.samplers import scheduler_of

#: Pixels of a side: what the scale of every VAE of these models divides, and the most that is taken.
SIDE_STEP, MAX_SIDE = 8, 2048
MAX_STEPS = 1000
MAX_IMAGES = 64
#: Characters of a prompt. The tokenizer reads all of them, also where the model takes 77 tokens.
MAX_PROMPT = 1 << 16
#: diffusers' defaults of `strength`, without a mask and with one.
IMAGE_STRENGTH, MASK_STRENGTH = 0.8, 1.0

PictureFormat = Literal["png", "webp"]


def _side(value: int) -> int:
    if value % SIDE_STEP:
        near_ones = f"{value - value % SIDE_STEP} and {value + -value % SIDE_STEP}"
        raise InvalidValueError(f"height, width: {value} pixels are no multiple of {SIDE_STEP}; {near_ones} are")
    return value


Side = Annotated[int, Field(ge=SIDE_STEP, le=MAX_SIDE), AfterValidator(_side)]


def _scheduler(value: object) -> object:
    """Refuse other programs' names of schedulers with diffusers' own."""
    if isinstance(value, str) and not value.endswith("Scheduler") and (meant := scheduler_of(value)[0]):
        raise InvalidValueError(f"scheduler: {value!r} is called {meant} here")
    return value


Scheduler = Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,64}$"), BeforeValidator(_scheduler)]


class ImageParams(Frozen):
    """Parameters of pictures.

    Attributes:
        num_inference_steps: of the denoising.
        guidance_scale: how closely a picture follows the prompt; at 1 and below there is no guidance, and a step costs
            half.
        height, width: pixels, multiples of 8; None: what the model was trained for.
        negative_prompt: what a picture is to keep away from; needs guidance.
        num_images_per_prompt: pictures of each prompt.
        seed: of the first picture; the next has seed + 1 (behind the largest, 2**63 - 1, comes 0). None: drawn.
        scheduler: a scheduler's class of diffusers in place of the model's own.
        image_format: of the pictures' bytes: "png" or (smaller, not exact) "webp".
        preview_steps: every so many steps progress comes with a small picture of the latents; 0: never.
        strength: with a picture to begin from: how much of it noise replaces, and which share of the steps is done;
            1: nothing is left of it. None: 0.8, and with a mask 1.
    """

    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 50
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 7.5
    height: Side | None = None
    width: Side | None = None
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT)] | None = None
    num_images_per_prompt: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    scheduler: Scheduler | None = None
    image_format: PictureFormat = "png"
    preview_steps: Annotated[int, Field(ge=0, le=MAX_STEPS)] = 0
    strength: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.negative_prompt and self.guidance_scale <= 1:
            raise InvalidValueError("negative_prompt: acts only with a guidance_scale above 1")
        if self.strength is not None and not steps_of(self):
            raise InvalidValueError(
                f"strength: of {self.num_inference_steps} steps {self.strength:g} is none; take more of either"
            )
        return self


def steps_done(steps: int, strength: float) -> int:
    """How many of the steps are done: with a picture to begin from only the last ones, by diffusers' rounding."""
    return min(int(steps * strength), steps)


def steps_of(params: ImageParams) -> int:
    """The same of parameters."""
    return steps_done(params.num_inference_steps, 1.0 if params.strength is None else params.strength)


def with_strength(params: ImageParams, *, image: bool, mask: bool) -> ImageParams:
    """The parameters with a strength where a picture is begun from.

    Raises:
        InvalidRequest: a mask or a strength without a picture, or so little strength that no step is left.
    """
    if not image:
        for name, there in (("mask_image", mask), ("strength", params.strength is not None)):
            if there:
                raise InvalidRequest(f"{name}: acts only with a picture to begin from.", hint="Give image= too.")
        return params
    if params.strength is not None:
        return params
    values = params.model_dump(exclude_unset=True)
    return ImageParams.parse(values | {"strength": MASK_STRENGTH if mask else IMAGE_STRENGTH}, error=InvalidRequest)


#: diffusers' arguments that have no meaning here, and what to do instead.
REFUSED_IMAGES = {
    "generator": "Use seed=; a picture's generator is made from it, on the CPU.",
    "latents": "Use seed=.",
    "output_type": "Pictures come as PIL images in .images.",
    "callback_on_step_end": "Progress is shown; canceling is heard at any time.",
    "return_dict": "See the result's attributes.",
    "padding_mask_crop": "Crop the picture and its mask before, and paste the result after.",
}
#: What a request takes besides.
_BESIDES = ("image", "mask_image", "on_progress", "timeout_s")
#: What other programs call a parameter.
_OTHER_NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "negative": "negative_prompt",
    "num_images": "num_images_per_prompt",
    "sampler": "scheduler",
    "init_image": "image",
    "mask": "mask_image",
    "denoising_strength": "strength",
    "timeout": "timeout_s",
}


def parse_images(values: Mapping[str, Any]) -> ImageParams:
    """The parameters of keyword arguments; None stands for a default.

    Raises:
        InvalidRequest: an unknown, refused or wrong parameter; the message names it.
    """
    known = (*ImageParams.model_fields, *_BESIDES)
    for name in values:
        if name in ImageParams.model_fields:
            continue
        if name in REFUSED_IMAGES:
            raise InvalidRequest(f"{name} cannot be set.", hint=REFUSED_IMAGES[name])
        if name in _OTHER_NAMES:
            raise InvalidRequest(f"There is no option {name!r}.", hint=f"Use {_OTHER_NAMES[name]}.")
        if (meant := near(name, (*known, *REFUSED_IMAGES))) in REFUSED_IMAGES:
            raise InvalidRequest(f"There is no option {name!r}.", hint=REFUSED_IMAGES[meant])
        raise InvalidRequest(f"There is no option {name!r}.", hint=did_you_mean(name, known))
    kept = {name: value for name, value in values.items() if value is not None}
    return ImageParams.parse(kept, error=InvalidRequest)
