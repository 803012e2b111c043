"""Folders of pipelines of Stable Diffusion 1.5's shape, where no checkpoint is.

`python -m miinb.bench.image_folder DIR` writes the configurations alone, which `load_format="dummy"` serves with random
weights; `write` saves weights, so that two engines have the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from miinb.engine.clip_tokenizer import clip_tokenizer

TOKENS = 77
_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
_TINY_UNET: dict[str, Any] = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32, "norm_num_groups": 8}
_TINY_VAE: dict[str, Any] = {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4}
#: Stable Diffusion 1.5's, of class PNDM.
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_TEXT: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_TEXT |= {"num_attention_heads": 12, "vocab_size": 49408}
_TINY_TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_TINY_TEXT |= {"num_attention_heads": 2, "vocab_size": 1000}


def write(folder: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, *, tiny: bool = False) -> Path:
    """Save a StableDiffusionPipeline of these parts and of a random text encoder, as safetensors.

    Args:
        folder: made if it is not there.
        unet, vae: with weights; the text encoder gets their dtype.
        tiny: a text encoder of two layers, else that of Stable Diffusion 1.x.
    """
    shape = _TINY_TEXT if tiny else _TEXT
    words = tokenizer(shape["vocab_size"])
    marks = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = CLIPTextConfig(**shape, max_position_embeddings=TOKENS, hidden_act="quick_gelu", **marks)
    torch.manual_seed(1)
    text = CLIPTextModel(config).to(unet.dtype)
    missing: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text,
        tokenizer=words,
        scheduler=PNDMScheduler(**SCHEDULER),
        requires_safety_checker=False,
        **missing,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def write_configurations(folder: Path, *, tiny: bool = False) -> None:
    """Save the configurations of such a pipeline, without weights and tokenizer."""
    with torch.device("meta"):
        UNet2DConditionModel(**unet_config(tiny=tiny)).save_config(folder / "unet")
        AutoencoderKL(**vae_config(tiny=tiny)).save_config(folder / "vae")
    text = CLIPTextConfig(**_TINY_TEXT if tiny else _TEXT, max_position_embeddings=TOKENS)
    text.save_pretrained(folder / "text_encoder")
    PNDMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def unet_config(*, tiny: bool) -> dict[str, Any]:
    """Of Stable Diffusion 1.5, or a tiny one."""
    return _UNET | (_TINY_UNET if tiny else {})


def vae_config(*, tiny: bool) -> dict[str, Any]:
    """Of Stable Diffusion 1.5, or a tiny one."""
    return _VAE | (_TINY_VAE if tiny else {})


def tokenizer(vocab_size: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE of exactly that size (from 514 on): its pieces are made up, so that every id is text."""
    letters = sorted(ByteLevel.alphabet())
    merges = itertools.islice(_merges(letters), vocab_size - 2 * len(letters) - 2)
    return clip_tokenizer(list(merges), length=TOKENS)


def _merges(letters: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of letters that become one piece, those of lower case first."""
    ordered = sorted(letters, key=lambda letter: (not ("a" <= letter <= "z"), letter))
    for first, last in itertools.product(ordered, ordered):
        yield first, f"{last}</w>"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write configurations."""
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.image_folder", description=__doc__)
    parser.add_argument("folder", type=Path, help="made if it is not there")
    parser.add_argument("--tiny", action="store_true", help="of a tiny model")
    options = parser.parse_args(arguments)
    write_configurations(options.folder, tiny=options.tiny)


if __name__ == "__main__":
    main()
