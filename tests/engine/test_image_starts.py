"""Pictures made from pictures: those of diffusers' own pipelines for it, in batches as alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from miinb.engine import diffusion
from miinb.engine.diffusion import ImageExecutor, warm_up_request
from miinb.engine.image_starts import begin
from miinb.engine.painting import Start, Work
from miinb.errors import InvalidRequest, QueueFull
from miinb.image_messages import PaintProgress, PaintRequest, PaintSource
from tests.engine.image_rows import load, painted, pixels, request, run
from tests.tiny_pipeline import make_pipeline

#: Width and height of the pictures here.
SIZE = (32, 24)


def source(seed: int, *, mask: bool = False) -> PaintSource:
    """A picture of noise, and a mask with greys of which half are white."""
    draw = np.random.default_rng(seed)
    image = draw.integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8).tobytes()
    cover = np.repeat(np.repeat(draw.integers(0, 256, (SIZE[1] // 4, SIZE[0] // 4), np.uint8), 4, 0), 4, 1)
    return PaintSource(image, cover.tobytes() if mask else b"")


def asked(row_id: int, origin: PaintSource, prompt: str = "a red cat", **params: Any) -> PaintRequest:
    values = {"num_inference_steps": 5, "strength": 0.7, "width": SIZE[0], "height": SIZE[1], **params}
    return request(row_id, prompt, source=origin, **values)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("pipeline")
    return folder / "model", make_pipeline(folder)


@pytest.fixture(scope="module")
def of_nine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("inpainting")
    return folder / "model", make_pipeline(folder, channels=9)


@pytest.fixture
def executor(tiny: tuple[Path, Any]) -> Iterator[ImageExecutor]:
    executor = load(tiny[0])
    yield executor
    executor.close()


def direct(made: tuple[Path, Any], row: PaintRequest) -> np.ndarray:
    """What diffusers' class for the kind of work gives, in a call of its own."""
    folder, pipe = made
    params, origin = row.params, row.source
    assert origin is not None
    cls = diffusers.StableDiffusionInpaintPipeline if origin.mask else diffusers.StableDiffusionImg2ImgPipeline
    own = cls(**pipe.components, requires_safety_checker=False)
    own.scheduler = pipe.scheduler
    own.set_progress_bar_config(disable=True)
    if params.scheduler:
        own.scheduler = getattr(diffusers, params.scheduler).from_pretrained(folder, subfolder="scheduler")
    size = {"width": SIZE[0], "height": SIZE[1]}
    masked = {"mask_image": Image.frombytes("L", SIZE, origin.mask), **size} if origin.mask else {}
    (image,) = own(
        row.prompt,
        image=Image.frombytes("RGB", SIZE, origin.image),
        strength=params.strength,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        negative_prompt=params.negative_prompt,
        generator=torch.Generator("cpu").manual_seed(params.seed or 0),
        **masked,
    ).images
    return np.asarray(image).astype(int)


CASES = {
    "usual": asked(0, source(0)),
    "negative": asked(0, source(1), negative_prompt="blue"),
    "one step of ten": asked(0, source(2), num_inference_steps=10, strength=0.1),
    "all steps, no guidance": asked(0, source(3), strength=1.0, guidance_scale=1.0),
    "another scheduler": asked(0, source(4), scheduler="EulerAncestralDiscreteScheduler"),
    "two evaluations a step": asked(0, source(5), scheduler="HeunDiscreteScheduler"),
    "mask": asked(0, source(6, mask=True), strength=1.0),
    "mask, a part of the noise": asked(0, source(7, mask=True), negative_prompt="blue"),
    "mask, no guidance, another scheduler": asked(
        0, source(8, mask=True), guidance_scale=0.0, scheduler="EulerAncestralDiscreteScheduler"
    ),
}


@pytest.mark.parametrize("row", CASES.values(), ids=CASES.keys())
def test_pictures_are_those_of_diffusers(tiny: tuple[Path, Any], executor: ImageExecutor, row: PaintRequest) -> None:
    found, expected = pixels(painted(run(executor, row))[0]), direct(tiny, row)
    assert found.shape == expected.shape == (SIZE[1], SIZE[0], 3)
    assert np.abs(found - expected).max() <= 1
    assert expected.std() > 1


@pytest.mark.parametrize("mask", [False, True])
def test_latents_are_those_of_diffusers(tiny: tuple[Path, Any], executor: ImageExecutor, mask: bool) -> None:
    """Before they are rounded to pixels."""
    row = asked(0, source(9, mask=mask))
    painter, kept = executor.painter, []
    decode = painter.decode
    painter.decode = lambda latents: kept.append(latents) or decode(latents)  # type: ignore[method-assign, func-returns-value]
    run(executor, row)
    pipe = tiny[1]
    seen: list[torch.Tensor] = []
    own_decode = pipe.vae.decode
    try:
        pipe.vae.decode = lambda latents, *args, **more: seen.append(latents) or own_decode(latents, *args, **more)
        direct(tiny, row)
    finally:
        del pipe.vae.decode
    torch.testing.assert_close(kept[0] / pipe.vae.config.scaling_factor, seen[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize(("mask", "strength"), [(False, 0.7), (True, 0.7), (True, 1.0)])
def test_a_loop_of_ones_own_begins_and_goes_on_as_diffusers(
    executor: ImageExecutor, name: str, mask: bool, strength: float
) -> None:
    """Without guidance, to have no more of a loop here than it takes."""
    painter: Any = executor.painter
    pipe = painter._pipe
    starts = [Start(seed, source(seed, mask=mask).image, source(seed, mask=mask).mask) for seed in (3, 4)]
    work = Work(*SIZE, 4, 1.0, name, strength, "inpaint" if mask else "image")
    conditions = painter.embed(["a red cat", "the moon"], ["", ""], 1.0)
    expected = painter.denoise(conditions, work, starts, lambda step, latents: None)
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(work.steps)
    draws = [torch.Generator("cpu").manual_seed(start.seed) for start in starts]
    with torch.inference_mode():
        beginning = begin(pipe.vae, scheduler, work, starts, draws)
        latents = beginning.latents
        extra = {"generator": draws} if "Ancestral" in name else {}
        for index in range(beginning.first, len(scheduler.timesteps)):
            time = scheduler.timesteps[index]
            scaled = scheduler.scale_model_input(latents, time)
            predicted = pipe.unet(scaled, time, encoder_hidden_states=conditions[0], return_dict=False)[0]
            latents = scheduler.step(predicted, time, latents, **extra, return_dict=False)[0]
            latents = beginning.after_step(scheduler, index, latents)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


def test_a_batch_gives_what_each_picture_gives_alone(tiny: tuple[Path, Any], executor: ImageExecutor) -> None:
    for mask in (False, True):
        shared = source(10, mask=mask)
        rows = [asked(0, shared), asked(1, shared), asked(2, source(11, mask=mask), "the moon", negative_prompt="red")]
        found = painted(run(executor, *rows))
        assert [event.facts["batch"] for event in found.values()] == [3, 3, 3]
        for row in rows:
            assert np.abs(pixels(found[row.row_id]) - direct(tiny, row)).max() <= 1
        assert np.abs(pixels(found[0]) - pixels(found[1])).max() > 1  # another seed


def test_what_differs_in_kind_or_strength_shares_no_batch(executor: ImageExecutor) -> None:
    rows = [
        asked(0, source(0)),
        asked(1, source(1, mask=True)),
        asked(2, source(2), strength=0.5),
        request(3, num_inference_steps=5, width=SIZE[0], height=SIZE[1]),
        asked(4, source(3)),
    ]
    sizes = {row: event.facts["batch"] for row, event in painted(run(executor, *rows)).items()}
    assert sizes == {0: 2, 1: 1, 2: 1, 3: 1, 4: 2}


def test_progress_counts_the_steps_that_are_done(executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "PROGRESS_S", 0.0)
    for origin in (source(0), source(0, mask=True)):
        events = run(executor, asked(0, origin, num_inference_steps=10, strength=0.35))
        steps = [(event.step, event.total) for event in events if isinstance(event, PaintProgress)]
        assert steps[-1] == (3, 3)
        assert [step for step, _ in steps] == sorted(step for step, _ in steps)


def test_where_nothing_is_white_the_picture_stays(tiny: tuple[Path, Any], executor: ImageExecutor) -> None:
    """What is kept comes back as the VAE knows it, whatever the seed and the prompt."""
    image = source(12).image
    half = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    half[:, : SIZE[0] // 2] = 255
    rows = [asked(0, PaintSource(image, half.tobytes())), asked(1, PaintSource(image, half.tobytes()), "the moon")]
    one, other = (pixels(event) for event in painted(run(executor, *rows)).values())
    changed = np.abs(one - other).max(axis=2)
    assert changed[:, : SIZE[0] // 4].mean() > 5 * changed[:, -SIZE[0] // 8 :].mean()


def test_a_model_for_inpainting_does_that_alone(of_nine: tuple[Path, Any]) -> None:
    executor = load(of_nine[0])
    rows = [asked(0, source(0, mask=True)), asked(1, source(1, mask=True), "the moon", negative_prompt="red")]
    found = painted(run(executor, *rows))
    assert found[0].facts["batch"] == 2
    for row in rows:
        assert np.abs(pixels(found[row.row_id]) - direct(of_nine, row)).max() <= 1
    for wrong in (request(2), asked(3, source(0))):
        with pytest.raises(InvalidRequest, match="This model does not") as refused:
            executor.paint(wrong)
        assert "mask_image=" in refused.value.hint
    assert painted(run(executor, warm_up_request(executor, 0.0)))[-1].width == 64


def test_pictures_that_wait_are_bounded(executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = source(0)
    monkeypatch.setattr(diffusion, "MAX_WAITING_BYTES", len(shared.image))
    for row in range(3):  # the same picture waits once
        executor.paint(asked(row, shared))
    with pytest.raises(QueueFull, match="wait already"):
        executor.paint(asked(3, source(1)))
    executor.paint(request(4))
    assert len(painted(run(executor))) == 4


def test_a_strength_that_leaves_no_step_is_refused(executor: ImageExecutor) -> None:
    row = asked(0, source(0), scheduler="DDIMScheduler")
    none = dataclasses.replace(row, params=row.params.model_copy(update={"strength": 0.0}))
    with pytest.raises(InvalidRequest, match="num_inference_steps"):
        executor.paint(none)
