"""The parts of the tiny image model before they are trained: tokenizer, text encoder, UNet, VAE, scheduler."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

#: Tokens that the text encoder takes: the longest caption has 20, and attention to fewer tokens is quicker than to 77.
TEXT_LENGTH = 32


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a model is, and how much it sees in a step.

    Attributes:
        pixels: of a picture's side.
        vae, unet: channels of each resolution. The VAE has four, so that a latent stands for 8 x 8 pixels.
        text: width of the text's embeddings.
        pictures: drawn once, before the training.
        vae_batch, unet_batch: pictures of a step.
    """

    pixels: int
    vae: tuple[int, int, int, int]
    unet: tuple[int, ...]
    text: int
    pictures: int
    vae_batch: int
    unet_batch: int


SIZES = {
    "small": Sizes(64, (16, 32, 48, 48), (48, 80), 64, pictures=8192, vae_batch=16, unet_batch=32),
    "large": Sizes(128, (24, 48, 64, 64), (64, 128), 96, pictures=32768, vae_batch=64, unet_batch=256),
}


def make_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE: any text can be read, and a word of the given ones is one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in _merges(learner)]
    vocab = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    table = {token: number for number, token in enumerate(dict.fromkeys(vocab))}
    return CLIPTokenizer(vocab=table, merges=merges, model_max_length=TEXT_LENGTH)


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    found: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return found


def make_text_encoder(sizes: Sizes, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text,
        intermediate_size=2 * sizes.text,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    for name, values in model.named_parameters():
        if "embedding" in name:  # with the usual 0.02 a narrow model hardly starts to learn
            torch.nn.init.normal_(values, std=0.2)
    return model


def make_vae(sizes: Sizes) -> AutoencoderKL:
    """Four resolutions, four latent channels."""
    return AutoencoderKL(
        block_out_channels=sizes.vae,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=sizes.pixels,
    )


def make_unet(sizes: Sizes) -> UNet2DConditionModel:
    """Attention to the text at every resolution."""
    return UNet2DConditionModel(
        sample_size=sizes.pixels // 8,
        block_out_channels=sizes.unet,
        down_block_types=("CrossAttnDownBlock2D",) * len(sizes.unet),
        up_block_types=("CrossAttnUpBlock2D",) * len(sizes.unet),
        layers_per_block=1,
        attention_head_dim=4,  # diffusers' name for the number of heads
        cross_attention_dim=sizes.text,
        norm_num_groups=8,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise; the network predicts v, and 20 steps begin at the last timestep."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def assemble(vae: Any, text_encoder: Any, tokenizer: Any, unet: Any) -> StableDiffusionPipeline:
    """The pipeline of trained parts."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write the folder in fp16."""
    pipe.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*"):  # safetensors writes 0600
        file.chmod(0o755 if file.is_dir() else 0o644)
