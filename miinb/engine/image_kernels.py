"""Which Triton kernels a UNet and a VAE decoder launch, for `compile.compile_all`: found by running over shapes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from miinb.engine.compile import META, Kernel, recording
from miinb.engine.diffusion_spec import UnetSpec, VaeSpec
from miinb.engine.image_weights import RandomTensors
from miinb.engine.unet import Unet
from miinb.engine.unet_weights import unet_weights
from miinb.engine.vae import VaeDecoder, vae_weights


def kernels_of_images(
    unet_spec: UnetSpec,
    vae_spec: VaeSpec,
    *,
    dtype: torch.dtype,
    sizes: Iterable[tuple[int, int, int]],
    steps: int = 50,
    tokens: int = 77,
    guided: bool = True,
) -> list[Kernel]:
    """The kernels of prompts, steps and pictures of these sizes; to be called within `compile.compiling_for`.

    Args:
        unet_spec: of the UNet.
        vae_spec: of the VAE decoder.
        dtype: of both.
        sizes: pictures of a step, and height and width of their latents.
        steps: of a prompt.
        tokens: of a text.
        guided: whether there are two texts a picture.
    """
    unet = Unet(unet_spec, unet_weights(unet_spec, RandomTensors(dtype, META)))
    vae = VaeDecoder(vae_spec, vae_weights(vae_spec, RandomTensors(dtype, META)))
    index = torch.empty(1, dtype=torch.int64, device=META)
    with recording() as kernels:
        for pictures, height, width in sizes:
            texts = 2 * pictures if guided else pictures
            text = torch.empty((texts, tokens, unet_spec.text_width), dtype=dtype, device=META)
            conditions = unet.prepare(text, torch.empty(steps, device=META))
            unet.step(torch.empty((pictures, unet_spec.inputs, height, width), device=META), index, conditions)
            for together in {1, pictures}:
                vae.decode(torch.empty((together, vae_spec.inputs, height, width), device=META))
    return kernels
