"""Which Triton kernels a UNet and a VAE decoder launch, for `compile.compile_all`: found by running over shapes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from miinb.config import DeploymentConfig
from miinb.engine.diffusion_spec import UnetSpec, VaeSpec
from miinb.engine.image_weights import RandomTensors
from miinb.engine.quantize import Quantizer
from miinb.engine.recording import META, Kernel, recording
from miinb.engine.unet import Unet
from miinb.engine.unet_graphs import batches
from miinb.engine.unet_weights import unet_weights
from miinb.engine.vae import VaeDecoder, vae_weights
from miinb.engine.weights import DTYPES, quantizers
from miinb.pipelines import Pipeline


def kernels_of_pipeline(config: DeploymentConfig, pipeline: Pipeline) -> list[Kernel]:
    """Those of pictures of the usual size, in all batches that are graphs; none where diffusers serves.

    Args:
        config: with a plan's choices; its `dtype` and `max_batch` count here.
        pipeline: of the model.
    """
    spec = pipeline.diffusion
    if spec is None or config.dtype == "auto":
        return []
    height, width = pipeline.height // pipeline.scale, pipeline.width // pipeline.scale
    sizes = [(batch, height, width) for batch in batches(config.max_batch or 1)]
    kernels: dict[tuple[str, str], Kernel] = {}
    for guided in (True, False):
        found = kernels_of_images(
            spec.unet,
            spec.vae,
            dtype=DTYPES[pipeline.compute_dtype(config.dtype, on_gpu=True)],
            quantizer=quantizers(config.dtype, META)[0],
            sizes=sizes,
            tokens=pipeline.text_length,
            guided=guided,
            reuse=config.options.step_reuse > 1,
        )
        kernels |= {(kernel.name, kernel.specialization): kernel for kernel in found}
    return list(kernels.values())


def kernels_of_images(
    unet_spec: UnetSpec,
    vae_spec: VaeSpec,
    *,
    dtype: torch.dtype,
    sizes: Iterable[tuple[int, int, int]],
    steps: int = 50,
    tokens: int = 77,
    guided: bool = True,
    reuse: bool = False,
    quantizer: Quantizer | None = None,
) -> list[Kernel]:
    """The kernels of prompts, steps and pictures of these sizes; to be called within `recording.compiling_for`.

    Args:
        unet_spec: of the UNet.
        vae_spec: of the VAE decoder.
        dtype: of both, but for what is quantized.
        sizes: pictures of a step, and height and width of their latents.
        steps: of a prompt.
        tokens: of a text.
        guided: whether there are two texts a picture.
        reuse: whether there are shallow steps too.
        quantizer: of the UNet, or None.
    """
    unet = Unet(unet_spec, unet_weights(unet_spec, RandomTensors(dtype, META), quantizer))
    vae = VaeDecoder(vae_spec, vae_weights(vae_spec, RandomTensors(dtype, META)))
    index = torch.empty(1, dtype=torch.int64, device=META)
    with recording() as kernels:
        for pictures, height, width in sizes:
            texts = 2 * pictures if guided else pictures
            text = torch.empty((texts, tokens, unet_spec.text_width), dtype=dtype, device=META)
            conditions = unet.prepare(text, torch.empty(steps, device=META))
            latents = torch.empty((pictures, unet_spec.inputs, height, width), device=META)
            if reuse:
                _, deep = unet.whole_step(latents, index, conditions)
                unet.shallow_step(latents, index, conditions, deep)
            else:
                unet.step(latents, index, conditions)
            for together in {1, pictures}:
                vae.decode(torch.empty((together, vae_spec.inputs, height, width), device=META))
    return kernels
