"""What diffusers' pipelines of SDXL have otherwise: two text encoders, a pooled text, a VAE in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Embeddings [N, T, D] of prompts and negative prompts, then pooled ones [N, P]; None without guidance.
Conditions = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def embed(pipe: Any, prompts: Sequence[str], negatives: Sequence[str], guided: bool) -> Conditions:
    """The conditions of a batch; where diffusers has zeros for a negative prompt that is not given, an empty one is."""
    device = pipe._execution_device
    found: Conditions = pipe.encode_prompt(
        list(prompts), None, device, 1, guided, negative_prompt=list(negatives) if guided else None
    )
    text, negative, pooled, negative_pooled = found
    if negative is None or negative_pooled is None or not pipe.config.force_zeros_for_empty_prompt:
        return found
    empty = torch.tensor([not one for one in negatives], device=negative.device)
    negative = negative.masked_fill(empty[:, None, None], 0)
    return text, negative, pooled, negative_pooled.masked_fill(empty[:, None], 0)


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """The images [N, 3, H, W] of latents, between -1 and 1; in fp32 where the VAE's configuration says that it must."""
    vae, half = pipe.vae, pipe.vae.dtype == torch.float16
    if not (half and vae.config.force_upcast):
        return _decoded(vae, latents.to(vae.dtype))
    vae.to(dtype=torch.float32)
    try:
        return _decoded(vae, latents.float())
    finally:
        vae.to(dtype=torch.float16)


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        latents = latents * std / vae.config.scaling_factor + mean
    else:
        latents = latents / vae.config.scaling_factor
    image: Tensor = vae.decode(latents, return_dict=False)[0]
    return image
