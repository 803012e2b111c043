"""diffusers' StableDiffusionPipeline as published: the baseline of text-to-image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from miinb.config import DeploymentConfig
from miinb.engine.diffusion import ImageExecutor, Work
from miinb.engine.pipeline_parts import PipelineParts, check_parts, generators, load_pipe, parts_of
from miinb.errors import UnsupportedModel
from miinb.messages import EngineInfo, Phase
from miinb.models import ModelInfo
from miinb.pipelines import Pipeline


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


class PipelinePainter(PipelineParts):
    """Runs a pipeline of diffusers; see `Painter`.

    Args:
        pipe: a `StableDiffusionPipeline` on its device.
        pipeline: what its folder says.
    """

    def __init__(self, pipe: Any, pipeline: Pipeline) -> None:
        super().__init__(pipe, pipeline, guides=pipe.unet.config.time_cond_proj_dim is None)

    @torch.inference_mode()
    def denoise(
        self,
        conditions: tuple[Tensor, Tensor | None],
        work: Work,
        seeds: Sequence[int],
        between: Callable[[int, Tensor], None],
    ) -> Tensor:
        """See `Painter`."""
        prompts, negatives = conditions
        self.new_scheduler(work)

        def after(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            # some schedulers take more timesteps than steps: PNDM's first costs two
            between(max(1, (index + 1) * work.steps // pipe.num_timesteps), values["latents"])
            return values

        latents: Tensor = self._pipe(
            prompt_embeds=prompts,
            negative_prompt_embeds=negatives,
            width=work.width,
            height=work.height,
            num_inference_steps=work.steps,
            guidance_scale=work.guidance,
            generator=generators(seeds),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=after,
        )[0]
        return latents

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> tuple[bytes, bool]:
        """See `Painter`."""
        vae = self._pipe.vae
        return self.pixels(vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0])
