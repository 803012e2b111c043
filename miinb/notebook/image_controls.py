"""The parameters of pictures as controls, with diffusers' names."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import ipywidgets as W

from miinb.image_params import MAX_IMAGES, MAX_SIDE, MAX_STEPS, SIDE_STEP, ImageParams, parse_images
from miinb.notebook.controls import Fold, button, control, named
from miinb.samplers import SAMPLERS

#: Choices that leave it to the model.
OWN_SIZE, OWN_SCHEDULER = "(the model's)", "(the model's)"
#: Sizes to choose from: width and height in pixels.
SIZES = ((512, 512), (512, 768), (768, 512), (768, 768), (1024, 1024))
_ANOTHER = "another"
#: Steps between two previews.
_PREVIEW_STEPS = 4
#: The width of a name: diffusers' are long.
_LABEL = "14em"
#: The largest seed that a front end's numbers hold exactly, and that is drawn.
_MAX_SEED, _DRAWN_SEEDS = (1 << 53) - 1, 1 << 31


def negative_area() -> Any:
    """Where a negative prompt is written."""
    tooltip = "What the picture is to keep away from; needs a guidance_scale above 1"
    look = {"placeholder": "blurry, text", "rows": 1, "layout": {"width": "auto"}}
    return named(W.Textarea(description="Negative", tooltip=tooltip, **look), "negative")


def _field(kind: Any, name: str, tooltip: str, **traits: Any) -> Any:
    """A control with room for diffusers' long names."""
    made = control(kind, name, tooltip, **traits)
    made.layout.width, made.style.description_width = "26em", _LABEL
    return made


def new_seed() -> int:
    """A seed of a size that people can read out."""
    return random.randrange(_DRAWN_SEEDS)


class ImageControls:
    """The parameters of pictures as controls, with diffusers' names.

    Args:
        previews: whether there is a control for previews; where times are compared there is none.

    Attributes:
        negative: the negative prompt, to be placed below the prompt.
        box: the widget that holds all others.
    """

    def __init__(self, *, previews: bool = True) -> None:
        whole, real, side = W.BoundedIntText, W.BoundedFloatText, {"min": SIDE_STEP, "max": MAX_SIDE, "step": SIDE_STEP}
        self.negative = negative_area()
        known, steps = ImageParams(), "Steps of the denoising"
        self.num_inference_steps = _field(
            whole, "num_inference_steps", steps, value=known.num_inference_steps, min=1, max=MAX_STEPS
        )
        closely = "How closely the picture follows the prompt; at 1 and below a step costs half"
        self.guidance_scale = _field(
            real, "guidance_scale", closely, value=known.guidance_scale, min=0, max=100, step=0.5
        )
        sizes = [OWN_SIZE, *(f"{width} x {height}" for width, height in SIZES), _ANOTHER]
        self.size = _field(W.Dropdown, "size", "Width x height in pixels", options=sizes, value=OWN_SIZE)
        multiple = f"Pixels, a multiple of {SIDE_STEP}; for the size {_ANOTHER!r}"
        self.width = _field(whole, "width", multiple, value=512, **side)
        self.height = _field(whole, "height", multiple, value=512, **side)
        count = "How many pictures, with seeds one after the other"
        self.num_images_per_prompt = _field(whole, "num_images_per_prompt", count, value=1, min=1, max=MAX_IMAGES)
        self.seed = _field(whole, "seed", "Same seed, same picture", value=0, min=0, max=_MAX_SEED)
        self.lock = control(W.Checkbox, "lock seed", "Keep the seed; off: a new one for each request")
        self.draw = button("New seed", "new-seed", "Draw another seed", self._draw, icon="refresh")
        classes = [OWN_SCHEDULER, *sorted(set(SAMPLERS.values()))]
        self.scheduler = _field(
            W.Dropdown, "scheduler", "Another one of diffusers' classes", options=classes, value=OWN_SCHEDULER
        )
        formats = "Of the files: webp is smaller, and not exact"
        self.image_format = _field(W.Dropdown, "image_format", formats, options=["png", "webp"])
        self.preview_steps: Any = None
        if previews:
            every = "A small picture every so many steps; 0: none"
            self.preview_steps = _field(whole, "preview_steps", every, value=_PREVIEW_STEPS, min=0, max=MAX_STEPS)
        self._put_together()

    def _put_together(self) -> None:
        self.lock.layout.width, self.lock.indent = "auto", False
        lock = W.HBox([self.lock, self.draw], layout={"margin": f"0 0 0 {_LABEL}"})
        left = [self.num_inference_steps, self.guidance_scale, self.scheduler, self.image_format]
        right = [self.num_images_per_prompt, self.seed, lock, self.size, self.width, self.height]
        if self.preview_steps is not None:
            left.append(self.preview_steps)
        grid = W.Box([W.VBox(column) for column in (left, right)], layout={"flex_flow": "row wrap"})
        self._rows = W.VBox([grid])
        self.box = Fold("Parameters", self._rows, "parameters")
        self.size.observe(self._sized, "value")
        self._sized()

    def add(self, widget: Any) -> None:
        """Put something more below the parameters."""
        self._rows.children = (*self._rows.children, widget)

    def _sized(self, _: Any = None) -> None:
        """Width and height are the chosen size's; only of another one they are written."""
        chosen = self.size.value
        for field in (self.width, self.height):
            field.disabled = chosen != _ANOTHER
        if " x " in chosen:
            self.width.value, self.height.value = (int(part) for part in chosen.split(" x "))

    def _draw(self, _: Any = None) -> None:
        self.seed.value = new_seed()

    def values(self) -> dict[str, Any]:
        """Parameters for `Session.generate`; draws a new seed first unless it is locked.

        Raises:
            InvalidRequest: they do not go together.
        """
        chosen: dict[str, Any] = {
            "num_inference_steps": self.num_inference_steps.value,
            "guidance_scale": self.guidance_scale.value,
        }
        if self.negative.value.strip():
            chosen["negative_prompt"] = self.negative.value
        if self.size.value != OWN_SIZE:
            chosen |= {"width": self.width.value, "height": self.height.value}
        if self.num_images_per_prompt.value > 1:
            chosen["num_images_per_prompt"] = self.num_images_per_prompt.value
        if self.scheduler.value != OWN_SCHEDULER:
            chosen["scheduler"] = self.scheduler.value
        if self.image_format.value != "png":
            chosen["image_format"] = self.image_format.value
        parse_images(chosen)
        if not self.lock.value:
            self._draw()
        return chosen | {"seed": self.seed.value}

    @property
    def previews(self) -> dict[str, Any]:
        """The parameter that has no part in the picture."""
        every = self.preview_steps.value if self.preview_steps is not None else 0
        return {"preview_steps": every} if every else {}

    def load(self, values: Mapping[str, Any]) -> None:
        """Set the controls to the parameters of an earlier picture or of a file; what is not there is the default.

        What `misfits` names is left out.
        """
        defaults = ImageParams()
        self.negative.value = values.get("negative_prompt", "")
        for name in ("num_inference_steps", "guidance_scale", "num_images_per_prompt", "image_format"):
            getattr(self, name).value = values.get(name, getattr(defaults, name))
        if values.get("seed", 0) <= _MAX_SEED:
            self.seed.value = values.get("seed", self.seed.value)
        scheduler = values.get("scheduler", OWN_SCHEDULER)
        if scheduler not in self.scheduler.options:
            self.scheduler.options = (*self.scheduler.options, scheduler)
        self.scheduler.value = scheduler
        width, height = values.get("width"), values.get("height")
        if width is None or height is None:
            self.size.value = OWN_SIZE
        else:
            self.size.value = f"{width} x {height}" if (width, height) in SIZES else _ANOTHER
            self.width.value, self.height.value = width, height

    @staticmethod
    def misfits(values: Mapping[str, Any]) -> list[str]:
        """What of such parameters the controls cannot hold, a sentence each."""
        told = []
        if (seed := values.get("seed", 0)) > _MAX_SEED:
            told.append(f"Not taken over: the seed {seed}, too large for a panel; session.generate takes it.")
        if (values.get("width") is None) != (values.get("height") is None):
            told.append("Not taken over: the size, of which only one side is told.")
        return told

    def close(self) -> None:
        """Detach the observers."""
        self.size.unobserve_all()
