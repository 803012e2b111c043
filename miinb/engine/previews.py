"""Small pictures of latents while they are denoised, without the VAE."""

from __future__ import annotations

import torch
from torch import Tensor

#: Red, green and blue of the four channels of Stable Diffusion's latents: a linear fit of what its VAE makes of them.
#: (K. Turner, https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204)
LATENT_RGB = ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473))


def preview_of(latents: Tensor) -> tuple[int, bytes]:
    """A small picture of latents [C, h, w]: its width, and RGB; nothing where they are not Stable Diffusion's four."""
    if latents.shape[0] != len(LATENT_RGB):
        return 0, b""
    rgb = torch.einsum("chw,cr->hwr", latents.float(), torch.tensor(LATENT_RGB, device=latents.device))
    pixels = ((rgb + 1) * 127.5).nan_to_num().clamp(0, 255).to(torch.uint8)
    return int(latents.shape[2]), pixels.cpu().numpy().tobytes()
