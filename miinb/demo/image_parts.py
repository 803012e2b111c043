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

from miinb.engine.clip_tokenizer import clip_tokenizer

#: Tokens that the text encoder takes: the longest caption has 17, and attention to fewer tokens is quicker than to 77.
TEXT_LENGTH = 32


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a model is, and how much it sees in a step.

    Attributes:
        pixels: of a picture's side.
        vae, unet: channels of each resolution. A VAE of three makes a latent of 4 x 4 pixels, one of four of 8 x 8.
        text: width of the text's embeddings.
        pictures: drawn once, before the training.
        vae_batch, unet_batch: pictures of a step.
        vae_share: of the time, for the VAE; the rest is the UNet's and the text encoder's.
    """

    pixels: int
    vae: tuple[int, ...]
    unet: tuple[int, ...]
    text: int
    pictures: int
    vae_batch: int
    unet_batch: int
    vae_share: float

    @property
    def latents(self) -> int:
        """Of a picture's side."""
        return int(self.pixels // 2 ** (len(self.vae) - 1))


SIZES = {
    "small": Sizes(64, (16, 32, 48), (32, 48, 80), 64, pictures=6144, vae_batch=12, unet_batch=16, vae_share=0.2),
    "large": Sizes(128, (24, 48, 64, 64), (64, 128), 96, pictures=32768, vae_batch=64, unet_batch=256, vae_share=0.3),
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
    merges = [(first, second) for first, second in _merges(learner)]
    return clip_tokenizer(merges, length=TEXT_LENGTH)


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
    """Four latent channels. In its few and wide groups of channels a norm keeps what a picture's level is."""
    return AutoencoderKL(
        block_out_channels=sizes.vae,
        down_block_types=("DownEncoderBlock2D",) * len(sizes.vae),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.vae),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=sizes.pixels,
    )


def make_unet(sizes: Sizes) -> UNet2DConditionModel:
    """Attention, and that to the text, at the two lowest resolutions."""
    plain = len(sizes.unet) - 2
    return UNet2DConditionModel(
        sample_size=sizes.latents,
        block_out_channels=sizes.unet,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * plain,
        layers_per_block=1,
        attention_head_dim=4,  # diffusers' name for the number of heads
        cross_attention_dim=sizes.text,
        norm_num_groups=4,
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
