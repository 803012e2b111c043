"""Small pictures of latents while they are denoised, without the VAE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LatentColors:
    """Red, green and blue of latents: a linear fit of what a VAE makes of them.

    Attributes:
        weights: a row of three for each channel.
        bias: of the three; colors lie between -1 and 1.
    """

    weights: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)


#: Of Stable Diffusion 1.x and 2.x.
#: (K. Turner, https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204)
STABLE_DIFFUSION = LatentColors(
    ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473))
)
#: Of SDXL, as diffusers' documentation has them (using-diffusers/callback, by T. Vass), there for 0 to 255.
SDXL = LatentColors(
    ((0.471, 0.471, 0.471), (-0.471, -0.039, 0.078), (0.196, 0.118, -0.039), (-0.549, -0.392, -0.275)),
    (0.176, 0.098, 0.020),
)


def preview_of(latents: Tensor, colors: LatentColors) -> tuple[int, bytes]:
    """A small picture of latents [C, h, w]: its width, and RGB; nothing where they have other channels."""
    if latents.shape[0] != len(colors.weights):
        return 0, b""
    weights, bias = (torch.tensor(values, device=latents.device) for values in (colors.weights, colors.bias))
    rgb = torch.einsum("chw,cr->hwr", latents.float(), weights) + bias
    pixels = ((rgb + 1) * 127.5).nan_to_num().clamp(0, 255).to(torch.uint8)
    return int(latents.shape[2]), pixels.cpu().numpy().tobytes()
