"""Where denoising begins, for a loop that is not diffusers': what its pipelines do before their loop and after a step.

They are those for image to image and inpainting with a UNet of 4 channels. Generators are drawn from in their order, so
that the same seeds give the same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional

from miinb.engine.painting import Start, Work


@dataclass(frozen=True, slots=True)
class Kept:
    """What inpainting keeps.

    Attributes:
        latents: [N, C, h, w] of the pictures.
        noise: the same shape.
        mask: [N, 1, h, w], 1 where it is painted anew.
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a batch begins.

    Attributes:
        latents: [N, C, h, w], as much noise in them as the first timestep has.
        first: index of the first timestep that is computed, among the scheduler's.
        kept: of inpainting.
    """

    latents: Tensor
    first: int
    kept: Kept | None = None

    def after_step(self, scheduler: Any, index: int, latents: Tensor) -> Tensor:
        """Latents after the step of a timestep's index; where they are kept, the picture with the next one's noise."""
        kept = self.kept
        if kept is None:
            return latents
        picture = kept.latents
        if index + 1 < len(scheduler.timesteps):
            picture = scheduler.add_noise(picture, kept.noise, scheduler.timesteps[index + 1 : index + 2])
        return (1 - kept.mask) * picture + kept.mask * latents


def begin(
    vae: Any, scheduler: Any, work: Work, starts: Sequence[Start], generators: Sequence[torch.Generator]
) -> Beginning:
    """Where a batch of kind "image" or "inpaint" begins.

    Args:
        vae: diffusers', for its encoder; latents get its dtype and device.
        scheduler: diffusers', with its timesteps set; it is told which is the first.
        work: of the batch.
        starts: one a picture.
        generators: theirs, fresh.
    """
    first = (work.steps - work.done) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    images = [_between(start.image, work, 3).to(vae.device, vae.dtype) * 2 - 1 for start in starts]
    drawn = list(generators)
    samples = [vae.encode(image).latent_dist.sample(draw) for image, draw in zip(images, drawn, strict=True)]
    pictures = torch.cat(samples) * vae.config.scaling_factor

    def noise() -> Tensor:
        made: Tensor = randn_tensor(pictures.shape, generator=drawn, device=vae.device, dtype=vae.dtype)
        return made

    laid = noise()
    if work.kind == "inpaint" and work.strength == 1:
        latents = laid * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(pictures, laid, scheduler.timesteps[first : first + 1].repeat(len(starts)))
    if work.kind == "image":
        return Beginning(latents, first)
    noise()  # which diffusers draws for latents of the masked picture; a UNet of 4 channels has no use for them
    white = torch.cat([_between(start.mask, work, 1) for start in starts]) >= 0.5
    mask = functional.interpolate(white.float(), size=pictures.shape[2:]).to(vae.device, vae.dtype)
    return Beginning(latents, first, Kept(pictures, laid, mask))


def _between(pixels: bytes, work: Work, channels: int) -> Tensor:
    """Pixels as [1, channels, height, width] between 0 and 1."""
    values = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, work.height, work.width, channels)
    return values.permute(0, 3, 1, 2).float() / 255
