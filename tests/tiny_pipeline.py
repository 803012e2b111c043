"""A tiny Stable Diffusion with random weights, saved as diffusers saves one; its pictures are noise, but its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ("a", "cat", "fox", "red", "blue", "on", "the", "moon", "o", "n", "c", "t")
#: Pixels of a side, and tokens of a text, the two special ones included.
SIZE, TEXT_LENGTH = 32, 16


def tokenizer() -> Any:
    """CLIP's byte-level BPE, of few words."""
    from miinb.engine.clip_tokenizer import clip_tokenizer

    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[-2], parts[-1])
            parts[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
    return clip_tokenizer(merges, length=TEXT_LENGTH)


def make_pipeline(
    folder: Path, *, seed: int = 0, safety: bool = False, scheduler: Any = None, channels: int = 4
) -> Any:
    """The pipeline, in fp32 on the CPU, and saved to `folder / "model"`; of 9 channels it is one of inpainting."""
    import diffusers
    import torch
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    words = tokenizer()
    unet = _unet(channels, cross_attention_dim=32)
    vae = _vae()
    cls = diffusers.StableDiffusionPipeline if channels == 4 else diffusers.StableDiffusionInpaintPipeline
    pipe = cls(
        vae=vae,
        text_encoder=CLIPTextModel(_text(words)),
        tokenizer=words,
        unet=unet,
        scheduler=scheduler or diffusers.PNDMScheduler(**_BETAS, skip_prk_steps=True, steps_offset=1),
        **(_safety() if safety else {"safety_checker": None, "feature_extractor": None}),
        requires_safety_checker=safety,
    )
    return _saved(pipe, folder)


def make_xl(folder: Path, *, channels: int = 4) -> Any:
    """The same of SDXL: two text encoders, sizes and a pooled text beside the time."""
    import diffusers
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    words = tokenizer()
    cls = diffusers.StableDiffusionXLPipeline if channels == 4 else diffusers.StableDiffusionXLInpaintPipeline
    pipe = cls(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text(words)),
        text_encoder_2=CLIPTextModelWithProjection(_text(words, projection_dim=24)),
        tokenizer=words,
        tokenizer_2=tokenizer(),
        unet=_unet(
            channels,
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
            use_linear_projection=True,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**_BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    return _saved(pipe, folder)


_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _saved(pipe: Any, folder: Path) -> Any:
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model", safe_serialization=True)
    return pipe


def _unet(channels: int, **options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=SIZE // 2,
        in_channels=channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        **options,
    )


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )


def _text(words: Any, **options: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **options,
    )


def _safety() -> dict[str, Any]:
    """A checker that finds every picture unfit: each concept's threshold is below what a cosine can be."""
    import torch
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 16,
    }
    config = CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 16}, text_config=small, projection_dim=16
    )
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0)
        checker.special_care_embeds_weights.fill_(2.0)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return {"safety_checker": checker, "feature_extractor": processor}
