"""Tiny UNets and VAEs of the shapes of Stable Diffusion, random, saved as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

UNETS: dict[str, dict[str, Any]] = {
    # 8 heads everywhere, projections that are convolutions
    "sd1": {
        "block_out_channels": (16, 32, 48, 48),
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
    },
    # heads of one size, linear projections
    "sd2": {
        "block_out_channels": (16, 32, 64, 64),
        "attention_head_dim": (1, 2, 4, 4),
        "cross_attention_dim": 20,
        "norm_num_groups": 4,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    # what else a configuration may say: widths, depths, and channels of inpainting
    "other": {
        "in_channels": 9,
        "block_out_channels": (24, 48),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 3),
        "layers_per_block": (1, 2),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 12,
        "norm_num_groups": 6,
        "norm_eps": 1e-3,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}
VAES: dict[str, dict[str, Any]] = {
    "four": {
        "block_out_channels": (8, 16, 24, 24),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "norm_num_groups": 4,
    },
    "two": {
        "block_out_channels": (6, 18),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 3,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
}


def unet(name: str, seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """One in fp32; norms and biases are no longer 1 and 0, so that each of them counts."""
    torch.manual_seed(seed)
    return _stirred(UNet2DConditionModel(**UNETS[name] | changes))


def vae(name: str, seed: int = 0, **changes: Any) -> AutoencoderKL:
    """As `unet`."""
    torch.manual_seed(seed)
    return _stirred(AutoencoderKL(**VAES[name] | changes))


def _stirred(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    """The folder that the model was saved to."""
    model.save_pretrained(folder)
    return folder


def distance(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    error = (out.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(error)
