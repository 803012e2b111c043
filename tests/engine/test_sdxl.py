"""SDXL by the image executor: the pictures of diffusers' own pipelines, in batches as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from miinb import models
from miinb.engine import sdxl
from miinb.engine.diffusion import ImageExecutor
from miinb.errors import InvalidRequest
from miinb.image_messages import PaintProgress, PaintRequest, PaintSource
from tests.engine.image_rows import load, painted, pixels, request, run
from tests.tiny_pipeline import SIZE, TEXT_LENGTH, make_xl

PIXELS = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
COVER = np.repeat(np.uint8([255, 0]), SIZE * SIZE // 2)
SOURCES = {"image": PaintSource(PIXELS.tobytes()), "inpaint": PaintSource(PIXELS.tobytes(), COVER.tobytes())}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, ImageExecutor]:
    folder = tmp_path_factory.mktemp("xl")
    pipe = make_xl(folder)
    return folder / "model", pipe, load(folder / "model")


def direct(pipe: Any, row: PaintRequest) -> np.ndarray:
    params, source = row.params, row.source
    own, options = pipe, {"width": params.width, "height": params.height}
    if source is not None:
        options = {"image": Image.fromarray(PIXELS), "strength": params.strength}
        own = diffusers.StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    if source is not None and source.mask:
        options |= {"mask_image": Image.fromarray(COVER.reshape(SIZE, SIZE)), "width": SIZE, "height": SIZE}
        own = diffusers.StableDiffusionXLInpaintPipeline(**pipe.components, add_watermarker=False)
    own.set_progress_bar_config(disable=True)
    (image,) = own(
        row.prompt,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        negative_prompt=params.negative_prompt,
        generator=torch.Generator("cpu").manual_seed(params.seed or 0),
        **options,
    ).images
    return np.asarray(image).astype(int)


CASES = {
    "usual": request(0),
    "negative": request(0, negative_prompt="blue"),
    "no guidance, size": request(0, guidance_scale=1.0, width=24, height=40),
    "image": request(0, source=SOURCES["image"], strength=0.6, width=SIZE, height=SIZE),
    "mask": request(0, source=SOURCES["inpaint"], strength=0.8, width=SIZE, height=SIZE, negative_prompt="red"),
}


@pytest.mark.parametrize("row", CASES.values(), ids=CASES.keys())
def test_pictures_are_those_of_diffusers(made: tuple[Path, Any, ImageExecutor], row: PaintRequest) -> None:
    expected = direct(made[1], row)
    assert np.abs(pixels(painted(run(made[2], row))[0]) - expected).max() <= 1
    assert expected.std() > 1


def test_a_model_for_inpainting_does_that_alone(tmp_path: Path) -> None:
    pipe = make_xl(tmp_path, channels=9)
    executor = load(tmp_path / "model")
    row = request(0, source=SOURCES["inpaint"], strength=1.0, width=SIZE, height=SIZE)
    assert np.abs(pixels(painted(run(executor, row))[0]) - direct(pipe, row)).max() <= 1
    with pytest.raises(InvalidRequest, match="a text alone"):
        executor.paint(request(1))


def test_in_a_batch_only_empty_negative_prompts_are_zeros(made: tuple[Path, Any, ImageExecutor]) -> None:
    rows = [request(0), request(1, negative_prompt="blue fox"), request(2, "the moon")]
    found = painted(run(made[2], *rows))
    assert found[0].facts["batch"] == 3
    for row in rows:
        assert np.abs(pixels(found[row.row_id]) - direct(made[1], row)).max() <= 1


def test_a_vae_that_must_be_fp32_is_for_a_decoding(made: tuple[Path, Any, ImageExecutor]) -> None:
    pipe = made[1]
    latents = torch.randn(1, 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(0))
    expected = sdxl.decode(pipe, latents)
    assert pipe.vae.config.force_upcast
    pipe.vae.to(dtype=torch.float16)
    try:
        found = sdxl.decode(pipe, latents.half())
        assert pipe.vae.dtype == torch.float16
    finally:
        pipe.vae.to(dtype=torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_previews_are_there(made: tuple[Path, Any, ImageExecutor]) -> None:
    events = run(made[2], request(0, num_inference_steps=2, preview_steps=1))
    assert [event.width for event in events if isinstance(event, PaintProgress) and event.preview][-1] == SIZE // 2


def test_what_a_folder_holds(made: tuple[Path, Any, ImageExecutor]) -> None:
    folder, pipe, _ = made
    info = models.inspect(folder)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert info.parameters == sum(tensor.numel() for part in parts for tensor in part.state_dict().values())
    assert info.pipeline is not None
    assert info.pipeline.decode_bytes(2, SIZE, SIZE) == info.pipeline.decode_bytes(4, SIZE, SIZE)
    assert (info.task(), info.pipeline.text_length, info.pipeline.width) == ("text-to-image", TEXT_LENGTH, SIZE)
