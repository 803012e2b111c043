"""diffusers' pipelines of Stable Diffusion as published: the baseline of text-to-image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from miinb.config import DeploymentConfig
from miinb.engine import sdxl
from miinb.engine.diffusion import ImageExecutor
from miinb.engine.painting import Decoded, Kind, Start, Work
from miinb.engine.pipeline_parts import PipelineParts, check_parts, generators, load_pipe, parts_of
from miinb.errors import UnsupportedModel
from miinb.messages import EngineInfo, Phase
from miinb.models import ModelInfo
from miinb.pipelines import is_sdxl

#: What a pipeline is called with for conditions, in their order; the last two are SDXL's.
_CONDITIONS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def load_images(
    model: ModelInfo, config: DeploymentConfig, info: EngineInfo, report: Callable[[Phase], None]
) -> ImageExecutor:
    """The executor of an image pipeline.

    Args:
        model: with a pipeline.
        config: `options.max_queue` and `parity` count here.
        info: what the frontend is told; its plan gets a line about how diffusers is run.
        report: told of each phase.

    Raises:
        UnsupportedModel: diffusers cannot make the pipeline.
        BrokenCheckpoint: weights are missing, or hold NaN or infinity.
    """
    if model.pipeline is None:
        raise UnsupportedModel(f"{model.source} is no image pipeline.")
    report(Phase("load", 0, 1, f"{model.architecture} with diffusers"))
    pipe = load_pipe(model, model.pipeline, info)
    report(Phase("load", 1, 1))
    weights = sum(tensor.nbytes for part in parts_of(pipe).values() for tensor in part.parameters())
    if config.options.parity != "off":
        report(Phase("verify"))
        check_parts(pipe, model)
    checker = "kept" if model.pipeline.checks_safety else "none"
    plan = info.plan.with_line("diffusers", "eager", f"as published; safety checker: {checker}", weights_bytes=weights)
    painter = PipelinePainter(pipe, model.pipeline)
    info = dataclasses.replace(info, plan=plan)
    return ImageExecutor(painter, info, max_queue=config.options.max_queue)


def pipe_of(pipe: Any, kind: Kind) -> Any:
    """The pipeline for a kind of work: diffusers has a class for each, of the same parts."""
    import diffusers

    if kind == "text":
        return pipe
    xl, name = is_sdxl(type(pipe).__name__), "Inpaint" if kind == "inpaint" else "Img2Img"
    own = {"force_zeros_for_empty_prompt", "add_watermarker"} if xl else {"requires_safety_checker"}
    options = {option: pipe.config.get(option, False) for option in own}
    made = getattr(diffusers, f"StableDiffusion{'XL' if xl else ''}{name}Pipeline")(**pipe.components, **options)
    made.set_progress_bar_config(disable=True)
    return made


def inputs_of(work: Work, starts: Sequence[Start]) -> dict[str, Any]:
    """What a pipeline is called with for a kind of work, besides what all take."""
    size = {"width": work.width, "height": work.height}
    if work.kind == "text":
        return size
    from PIL import Image

    images = [Image.frombytes("RGB", (work.width, work.height), start.image) for start in starts]
    if work.kind == "image":
        return {"image": images, "strength": work.strength}
    masks = [Image.frombytes("L", (work.width, work.height), start.mask) for start in starts]
    return {"image": images, "mask_image": masks, "strength": work.strength, **size}


class PipelinePainter(PipelineParts):
    """Runs a pipeline of diffusers; see `Painter`."""

    @torch.inference_mode()
    def denoise(
        self,
        conditions: tuple[Tensor | None, ...],
        work: Work,
        starts: Sequence[Start],
        between: Callable[[int, Tensor], None],
    ) -> Tensor:
        """See `Painter`."""
        pipe = pipe_of(self._pipe, work.kind)
        pipe.scheduler = self.new_scheduler(work, starts)

        def after(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            # some schedulers take more timesteps than steps: PNDM's first costs two
            between(max(1, (index + 1) * work.done // pipe.num_timesteps), values["latents"])
            return values

        latents: Tensor = pipe(
            **dict(zip(_CONDITIONS, conditions, strict=False)),
            **inputs_of(work, starts),
            num_inference_steps=work.steps,
            guidance_scale=work.guidance,
            generator=generators(starts),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=after,
        )[0]
        return latents

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Decoded]:
        """See `Painter`."""
        if self._xl:
            return self.pixels(sdxl.decode(self._pipe, latents))
        vae = self._pipe.vae
        return self.pixels(vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0])
