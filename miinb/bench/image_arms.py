"""The arms of `images`: diffusers' pipeline and this engine on the same random weights, exact and lossy."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from miinb.bench import image_folder
from miinb.engine.diffusion_spec import unet_spec, vae_spec
from miinb.engine.image_blocks import can_pack, pack_convolutions
from miinb.engine.image_weights import tensors_of
from miinb.engine.step_reuse import StepReuse
from miinb.engine.unet import Unet
from miinb.engine.unet_graphs import GraphedUnet
from miinb.engine.unet_painter import decoded, denoised
from miinb.engine.unet_weights import unet_weights
from miinb.engine.vae import VaeDecoder, vae_weights
from miinb.engine.weights import quantizers

TOKENS = image_folder.TOKENS
#: What the arms are called in records and charts.
LABELS = {"diffusers": "baseline", "diffusers compiled": "baseline-best"}
#: The arm whose pictures those of lossy ones are compared with.
EXACT = "optimized"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked for: pictures of `size` pixels a side."""

    size: int = 512
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Lossy:
    """What an arm gives up, by its name: "step_reuse=3" or "int8"; the exact one is called otherwise and does not.

    Attributes:
        name: of the arm.
        step_reuse: one prediction in so many is whole.
        int8: whether the UNet's transformers have int8 weights.
    """

    name: str = EXACT
    step_reuse: int = 1
    int8: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """What a deployment is asked for."""
        return {"dtype": "int8"} if self.int8 else {"options": {"step_reuse": self.step_reuse}}

    @classmethod
    def read(cls, text: str) -> Lossy:
        """The one that is called so. Raises ValueError where none is."""
        if text == "int8":
            return cls(text, int8=True)
        if not re.fullmatch(r"step_reuse=([2-9]|10)", text):
            raise ValueError(f"{text!r} is neither int8 nor step_reuse=2 to 10")
        return cls(text, step_reuse=int(text.partition("=")[2]))


@dataclass(slots=True)
class Models:
    """diffusers' models, random, and where they are."""

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    dtype: str
    device: torch.device

    @classmethod
    def random(cls, *, tiny: bool, dtype: str, device: torch.device) -> Models:
        """Of the shape of Stable Diffusion 1.5, or tiny ones."""
        torch.manual_seed(0)
        with device:
            unet = UNet2DConditionModel(**image_folder.unet_config(tiny=tiny))
            vae = AutoencoderKL(**image_folder.vae_config(tiny=tiny))
        name = "tiny model" if tiny else "stable-diffusion-1.5 shape"
        return cls(name, unet.to(DTYPES[dtype]).eval(), vae.to(DTYPES[dtype]).eval(), dtype, device)

    def release(self) -> None:
        """Let the device's memory go: the models are not used any more."""
        del self.unet, self.vae
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def noise(self, batch: int, work: Work) -> tuple[Tensor, Tensor]:
        """[batch, 4, size / 8, size / 8] of noise and [2 * batch, 77, width] of text embeddings, the negative first."""
        generator = torch.Generator().manual_seed(work.seed)
        side, width = work.size // 8, self.unet.config.cross_attention_dim
        latents = torch.randn((batch, 4, side, side), generator=generator)
        text = torch.randn((2 * batch, TOKENS, width), generator=generator)
        return latents.to(self.device, DTYPES[self.dtype]), text.to(self.device, DTYPES[self.dtype])


class Arm:
    """One side of the comparison."""

    name = ""
    engine = ""
    dtype = ""

    def warm(self, batch: int, work: Work) -> None:
        """What is done once for a size."""

    def denoise(self, noise: Tensor, text: Tensor, work: Work) -> Tensor:
        """Latents of noise."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents."""
        raise NotImplementedError


class Diffusers(Arm):
    """diffusers' pipeline as published, or compiled."""

    engine = "baseline"

    def __init__(self, models: Models, *, compiled: bool) -> None:
        self.name, self.dtype = "diffusers compiled" if compiled else "diffusers", models.dtype
        self._vae = models.vae
        self._decode: Callable[..., Any] = models.vae.decode
        unet = models.unet
        if compiled:
            unet = torch.compile(unet.to(memory_format=torch.channels_last), mode="reduce-overhead", dynamic=False)
            self._decode = torch.compile(models.vae.to(memory_format=torch.channels_last).decode, dynamic=False)
        parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        scheduler = PNDMScheduler(**image_folder.SCHEDULER)
        self._pipeline = StableDiffusionPipeline(
            vae=models.vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts
        )
        self._pipeline.set_progress_bar_config(disable=True)

    def denoise(self, noise: Tensor, text: Tensor, work: Work) -> Tensor:
        """See `Arm`."""
        negative, positive = text.chunk(2)
        latents: Tensor = self._pipeline(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            latents=noise,
            num_inference_steps=work.steps,
            guidance_scale=work.guidance,
            output_type="latent",
        ).images
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """See `Arm`."""
        with torch.inference_mode():
            picture: Tensor = self._decode(latents / self._vae.config.scaling_factor, return_dict=False)[0]
        return picture


class Optimized(Arm):
    """This engine, with diffusers' scheduler."""

    engine = "optimized"

    def __init__(self, models: Models, lossy: Lossy | None = None) -> None:
        lossy = lossy or Lossy()
        self.name, self.dtype = lossy.name, "int8" if lossy.int8 else models.dtype
        self._step_reuse = lossy.step_reuse
        dtype, device = DTYPES[models.dtype], models.device
        quantizer, _ = quantizers(self.dtype, device)
        shape = unet_spec(models.unet.config)
        unet = Unet(shape, unet_weights(shape, tensors_of(models.unet, dtype, device), quantizer))
        decoder = vae_spec(models.vae.config)
        self._vae = VaeDecoder(decoder, vae_weights(decoder, tensors_of(models.vae, dtype, device)))
        if device.type == "cpu" and can_pack(dtype):
            pack_convolutions([unet.weights, self._vae.weights])
        self._scale = models.vae.config.scaling_factor
        self._unet: Unet | GraphedUnet = unet
        if device.type == "cuda":
            self._unet = GraphedUnet(unet, reuse=lossy.step_reuse > 1)

    def warm(self, batch: int, work: Work) -> None:
        """See `Arm`."""
        if isinstance(self._unet, GraphedUnet):
            self._unet.capture(batch, work.size // 8, work.size // 8, tokens=TOKENS, guided=True)

    def denoise(self, noise: Tensor, text: Tensor, work: Work) -> Tensor:
        """See `Arm`: the painter's own loop."""
        scheduler = PNDMScheduler(**image_folder.SCHEDULER)
        scheduler.set_timesteps(work.steps)
        unet = StepReuse(self._unet, self._step_reuse) if self._step_reuse > 1 else self._unet
        return denoised(unet, scheduler, noise * scheduler.init_noise_sigma, text, work.guidance)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Arm`."""
        return decoded(self._vae, latents / self._scale)


def arms_of(models: Models, *, lossy: Sequence[Lossy] = (), compiled: bool) -> Iterator[Arm]:
    """One after another: the compiled one changes the models' layout, so it comes last."""
    yield Diffusers(models, compiled=False)
    yield Optimized(models)
    for one in lossy:
        yield Optimized(models, one)
    if compiled:
        yield Diffusers(models, compiled=True)
