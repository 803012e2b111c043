"""The UNet and the VAE decoder against diffusers' own, tiny ones of every shape that is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from safetensors.torch import load_file, save_file

from miinb.engine.diffusion_spec import unet_spec, vae_spec
from miinb.engine.image_blocks import Conv, Sum, Upsampler, can_pack, pack_convolutions, upsample
from miinb.engine.image_weights import RandomTensors, weight_files
from miinb.engine.unet import Unet
from miinb.engine.unet_weights import load_unet, unet_weights
from miinb.engine.vae import VaeDecoder, load_vae, vae_weights
from miinb.errors import BrokenCheckpoint, UnsupportedModel
from miinb.kernels.dispatch import plain_operators
from tests.engine import tiny_images
from tests.engine.tiny_images import UNETS, VAES, distance, saved

CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Unet:
    return load_unet(folder, dtype=dtype, device=CPU)


def inputs(name: str, images: int, size: tuple[int, int], tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    channels = UNETS[name].get("in_channels", 4)
    return torch.randn(images, channels, *size), torch.randn(images, tokens, UNETS[name]["cross_attention_dim"])


@pytest.mark.parametrize(
    ("name", "images", "size"),
    [("sd1", 1, (16, 16)), ("sd1", 2, (18, 10)), ("sd1", 3, (9, 5)), ("sd2", 2, (16, 16)), ("sd2", 1, (11, 24)),
     ("other", 2, (12, 7)), ("other", 1, (1, 1))],
)  # fmt: skip
def test_a_step_is_diffusers(name: str, images: int, size: tuple[int, int], tmp_path: Path) -> None:
    model = tiny_images.unet(name)
    unet = load(saved(model, tmp_path))
    latents, text = inputs(name, images, size)
    timesteps = torch.tensor([981, 500, 1])
    conditions = unet.prepare(text, timesteps)
    for index, timestep in enumerate(timesteps):
        with torch.inference_mode():
            expected = model(latents, timestep, text).sample
        out = unet.step(latents, torch.tensor([index]), conditions)
        assert out.shape == expected.shape
        assert out.is_contiguous()
        assert distance(out, expected) < 1e-5


def test_latents_of_72_by_40(tmp_path: Path) -> None:
    model = tiny_images.unet("sd1", layers_per_block=1)
    unet = load(saved(model, tmp_path))
    latents, text = inputs("sd1", 2, (72, 40))
    with torch.inference_mode():
        expected = model(latents, 37.5, text).sample
    out = unet.step(latents, torch.tensor([0]), unet.prepare(text, torch.tensor([37.5])))
    assert distance(out, expected) < 1e-5


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_step_in_bf16_is_as_near_as_diffusers(name: str, tmp_path: Path) -> None:
    model = tiny_images.unet(name)
    unet = load(saved(model, tmp_path), torch.bfloat16)
    latents, text = inputs(name, 2, (16, 16))
    with torch.inference_mode():
        exact = model(latents, 500, text).sample
        rounded = model.bfloat16()(latents.bfloat16(), 500, text.bfloat16()).sample
    out = unet.step(latents, torch.tensor([0]), unet.prepare(text, torch.tensor([500])))
    assert out.dtype == torch.bfloat16
    assert distance(out, exact) < max(2 * distance(rounded, exact), 2e-2)
    assert distance(out, exact) > 0


@pytest.mark.parametrize("name", ["sd1", "other"])
def test_latents_that_guidance_shares(name: str, tmp_path: Path) -> None:
    """Once each, or as often as texts: where the text comes first, and where it does not."""
    unet = load(saved(tiny_images.unet(name), tmp_path))
    latents, text = inputs(name, 2, (9, 8))[0], inputs(name, 4, (1, 1))[1]
    conditions, index = unet.prepare(text, torch.tensor([400])), torch.tensor([0])
    both = unet.step(torch.cat((latents, latents)), index, conditions)
    assert distance(unet.step(latents, index, conditions), both) < 1e-6
    assert distance(both[:2], both[2:]) > 1e-3


SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddim v": (DDIMScheduler, {"clip_sample": False, "prediction_type": "v_prediction", "steps_offset": 1}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "euler": (EulerDiscreteScheduler, {"steps_offset": 1}),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_five_steps_with_guidance_end_at_the_same_latents(kind: str, tmp_path: Path) -> None:
    """Through diffusers' schedulers, as a pipeline calls them."""
    name = "sd2" if kind == "ddim v" else "sd1"
    model = tiny_images.unet(name)
    unet = load(saved(model, tmp_path))
    noise, text = inputs(name, 1, (16, 12))[0], inputs(name, 2, (1, 1))[1]

    def loop(fused: bool) -> torch.Tensor:
        scheduler_class, options = SCHEDULERS[kind]
        scheduler = scheduler_class(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)
        scheduler.set_timesteps(5)
        conditions = unet.prepare(text, scheduler.timesteps)
        latents = noise * scheduler.init_noise_sigma
        for index, timestep in enumerate(scheduler.timesteps):
            both = scheduler.scale_model_input(torch.cat((latents, latents)), timestep)
            if fused:
                plain, guided = unet.step(both, torch.tensor([index]), conditions).chunk(2)
            else:
                plain, guided = model(both, timestep, text).sample.chunk(2)
            latents = scheduler.step(plain + 7.5 * (guided - plain), timestep, latents).prev_sample
        return latents

    with torch.inference_mode():
        expected = loop(fused=False)
    assert distance(loop(fused=True), expected) < 1e-4
    assert distance(noise, expected) > 1e-2


@pytest.mark.parametrize("outputs", [5, 8])
def test_doubling_is_a_convolution_of_neighbors(outputs: int) -> None:
    torch.manual_seed(0)
    conv = Conv(torch.randn(outputs, 3, 3, 3), torch.randn(outputs))
    for height, width in ((1, 1), (2, 3), (6, 4)):
        x = torch.randn(2, height, width, 3)
        neighbors = x.repeat_interleave(2, 1).repeat_interleave(2, 2).permute(0, 3, 1, 2)
        expected = F.conv2d(neighbors, conv.weight, conv.bias, padding=1).permute(0, 2, 3, 1)
        out = upsample(Sum(x), Upsampler.of(conv), (2 * height, 2 * width)).value()
        assert distance(out, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_in_onednns_layout_give_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    if not can_pack(dtype):
        pytest.skip("no oneDNN")
    plain, packed = (load(saved(tiny_images.unet("sd2"), tmp_path), dtype) for _ in range(2))
    pack_convolutions(packed.weights)
    assert packed.weights.conv_in.weight.is_mkldnn
    assert packed.weights.dtype == dtype
    latents, text = inputs("sd2", 2, (11, 8))
    conditions = plain.prepare(text, torch.tensor([500]))
    out, expected = (unet.step(latents, torch.tensor([0]), conditions) for unet in (packed, plain))
    assert distance(out, expected) < (1e-5 if dtype == torch.float32 else 3e-2)
    with plain_operators():
        assert distance(packed.step(latents, torch.tensor([0]), conditions), expected) < 1e-2


@pytest.mark.parametrize(("name", "images", "size"), [("four", 1, (8, 8)), ("four", 3, (5, 9)), ("two", 2, (3, 4))])
def test_pictures_are_diffusers(name: str, images: int, size: tuple[int, int], tmp_path: Path) -> None:
    model = tiny_images.vae(name)
    vae = load_vae(saved(model, tmp_path), dtype=torch.float32, device=CPU)
    latents = torch.randn(images, 4, *size)
    with torch.inference_mode():
        expected = model.decode(latents).sample
    out = vae.decode(latents)
    assert out.shape == expected.shape == (images, 3, size[0] * vae.spec.scale, size[1] * vae.spec.scale)
    assert distance(out, expected) < 1e-5
    half = load_vae(tmp_path, dtype=torch.bfloat16, device=CPU).decode(latents)
    with torch.inference_mode():
        rounded = model.bfloat16().decode(latents.bfloat16()).sample
    assert 0 < distance(half, expected) < max(2 * distance(rounded, expected), 2e-2)


def test_older_names_of_the_vaes_attention(tmp_path: Path) -> None:
    folder = saved(tiny_images.vae("two"), tmp_path)
    latents = torch.randn(1, 4, 3, 3)
    expected = load_vae(folder, dtype=torch.float32, device=CPU).decode(latents)
    (file,) = weight_files(folder)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        tensors[name] = tensor
    save_file(tensors, file)
    assert torch.equal(load_vae(folder, dtype=torch.float32, device=CPU).decode(latents), expected)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
        ({"num_class_embeds": 7}, "num_class_embeds"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ({"only_cross_attention": [True, False, False, False]}, "only_cross_attention"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"block_out_channels": [30, 60, 90, 90]}, "30 channels"),
        ({"block_out_channels": [32, 64]}, "4 blocks down"),
        ({"attention_head_dim": [8, 8]}, "attention_head_dim"),
        ({"cross_attention_dim": [8, 8, 8, 8]}, "cross_attention_dim"),
        ({"center_input_sample": True}, "center_input_sample"),
        ({"_class_name": "UNet2DModel"}, "UNet2DModel"),
    ],
)
def test_unets_that_are_not_known_are_refused_by_what_they_have(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedModel, match=word):
        unet_spec(change)


def test_vaes_that_are_not_known_are_refused() -> None:
    for change in (
        {"mid_block_add_attention": False},
        {"up_block_types": ["AttnUpDecoderBlock2D"]},
        {"act_fn": "relu"},
    ):
        with pytest.raises(UnsupportedModel, match="optimized diffusion engine"):
            vae_spec(change)


def test_what_is_wrong_with_a_checkpoint_is_said(tmp_path: Path) -> None:
    folder = saved(tiny_images.unet("other"), tmp_path)
    (file,) = weight_files(folder)
    whole = load_file(file)
    with pytest.raises(BrokenCheckpoint, match="nowhere"):
        load(tmp_path / "nowhere")

    def refused(error: type[Exception], word: str, **changed: torch.Tensor) -> None:
        save_file({**whole, **{name.replace("__", "."): tensor for name, tensor in changed.items()}}, file)
        with pytest.raises(error, match=word):
            load(folder)

    refused(UnsupportedModel, "lora.weight", lora__weight=torch.zeros(1))
    refused(BrokenCheckpoint, "shape", conv_in__weight=torch.zeros(1, 9, 3, 3))
    refused(BrokenCheckpoint, "NaN", conv_in__bias=torch.full((24,), float("nan")))
    save_file({name: tensor for name, tensor in whole.items() if name != "conv_out.bias"}, file)
    with pytest.raises(BrokenCheckpoint, match=r"lacks the tensor conv_out\.bias"):
        load(folder)
    file.unlink()
    with pytest.raises(BrokenCheckpoint, match="holds no"):
        load(folder)


def test_weights_in_several_files_and_in_half_precision(tmp_path: Path) -> None:
    model = tiny_images.unet("other")
    folder = saved(model, tmp_path / "one")
    latents, text = inputs("other", 1, (4, 4))

    def out(folder: Path) -> torch.Tensor:
        unet = load(folder)
        return unet.step(latents, torch.tensor([0]), unet.prepare(text, torch.tensor([3])))

    model.save_pretrained(tmp_path / "several", max_shard_size="200KB")
    assert len(weight_files(tmp_path / "several")) > 1
    assert distance(out(tmp_path / "several"), out(folder)) < 1e-6
    weight_files(tmp_path / "several")[0].unlink()
    with pytest.raises(BrokenCheckpoint, match="lacks diffusion_pytorch_model-00001"):
        load(tmp_path / "several")
    (tmp_path / "several" / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
    with pytest.raises(BrokenCheckpoint, match="damaged"):
        load(tmp_path / "several")
    model.save_pretrained(tmp_path / "half", variant="fp16")
    assert distance(out(tmp_path / "half"), out(folder)) < 1e-6
    assert weight_files(tmp_path / "half", half=True) == weight_files(tmp_path / "half")


def test_random_weights_have_the_shapes_of_a_checkpoint(tmp_path: Path) -> None:
    folder = saved(tiny_images.unet("sd1"), tmp_path)
    spec = unet_spec(json.loads((folder / "config.json").read_text()))
    unet = Unet(spec, unet_weights(spec, RandomTensors(torch.float32, CPU)))
    assert unet.weights.keys_values.weight.shape == load(folder).weights.keys_values.weight.shape
    latents, text = inputs("sd1", 1, (8, 8))
    assert unet.step(latents, torch.tensor([0]), unet.prepare(text, torch.tensor([3]))).isfinite().all()
    shape = vae_spec(VAES["four"])
    assert VaeDecoder(shape, vae_weights(shape, RandomTensors(torch.float32, CPU))).decode(latents).isfinite().all()
