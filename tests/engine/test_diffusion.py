"""The image executor over a tiny pipeline: the pictures of diffusers called directly, in batches as alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miinb.engine import diffusion
from miinb.engine.diffusion import ImageExecutor
from miinb.errors import BrokenCheckpoint, InvalidRequest, QueueFull
from miinb.image_messages import PaintProgress, PaintRequest
from miinb.messages import FailedEvent, FinishedEvent
from tests.engine.image_rows import load, painted, pixels, request, run
from tests.tiny_pipeline import SIZE, make_pipeline


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("pipeline")
    return folder / "model", make_pipeline(folder)


@pytest.fixture
def executor(tiny: tuple[Path, Any]) -> Iterator[ImageExecutor]:
    executor = load(tiny[0])
    yield executor
    executor.close()


def direct(pipe: Any, asked: PaintRequest) -> np.ndarray:
    """What diffusers gives, in a call of its own."""
    params = asked.params
    (image,) = pipe(
        asked.prompt,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        negative_prompt=params.negative_prompt,
        height=params.height,
        width=params.width,
        generator=torch.Generator("cpu").manual_seed(params.seed or 0),
    ).images
    return np.asarray(image).astype(int)


CASES = [
    request(0),
    request(1, "the blue fox on the moon", negative_prompt="red"),
    request(2, "", height=24, width=40),
    request(3, "a cat", guidance_scale=1.0, num_inference_steps=1),
    request(4, "the moon " * 200, num_inference_steps=7),
]


@pytest.mark.parametrize("asked", CASES, ids=["usual", "negative", "empty prompt, size", "no guidance", "long prompt"])
def test_pictures_are_those_of_diffusers(tiny: tuple[Path, Any], executor: ImageExecutor, asked: PaintRequest) -> None:
    event = painted(run(executor, asked))[asked.row_id]
    expected = direct(tiny[1], asked)
    assert pixels(event).shape == expected.shape
    assert np.abs(pixels(event) - expected).max() <= 1
    assert expected.std() > 1  # a picture, and not one color
    assert (event.seed, event.flagged, event.scheduler) == (asked.params.seed, False, "PNDMScheduler")


def test_a_batch_gives_what_each_picture_gives_alone(tiny: tuple[Path, Any], executor: ImageExecutor) -> None:
    prompts = ["a red cat", "a red cat", "the blue fox on the moon, " * 9, ""]
    asked = [request(place, prompt, negative_prompt="blue" * (place % 2)) for place, prompt in enumerate(prompts)]
    found = painted(run(executor, *asked))
    assert executor.status()["batches"] == 1
    assert all(event.facts["batch"] == 4 for event in found.values())
    for one in asked:
        assert np.abs(pixels(found[one.row_id]) - direct(tiny[1], one)).max() <= 1
    assert np.abs(pixels(found[0]) - pixels(found[1])).max() > 1  # another seed, another picture
    assert found[2].facts["cut"].startswith(("fox", "blue", "on", "the", "moon", ","))
    assert [found[row].facts["cut"] for row in (0, 1, 3)] == ["", "", ""]


def test_only_what_is_alike_shares_a_batch_and_at_most_max_batch(
    executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor.info = replace(executor.info, max_batch=2)
    asked = [request(0), request(1, num_inference_steps=2), request(2), request(3, width=24), request(4)]
    sizes = {row: event.facts["batch"] for row, event in painted(run(executor, *asked)).items()}
    assert sizes == {0: 2, 1: 1, 2: 2, 3: 1, 4: 1}
    monkeypatch.setattr(diffusion, "MAX_BATCH_BYTES", 3 * SIZE * SIZE)
    assert [event.facts["batch"] for event in painted(run(executor, request(0), request(1))).values()] == [1, 1]


def test_one_picture_waits_for_no_more_than_a_batch_of_anothers_many(executor: ImageExecutor) -> None:
    executor.info = replace(executor.info, max_batch=2)
    many = [replace(request(row, num_inference_steps=1), request_id="many") for row in range(5)]
    alike = replace(request(5, num_inference_steps=1), request_id="alike")
    events = run(executor, *many, alike)
    assert list(painted(events)) == [0, 5, 1, 2, 3, 4]
    other = replace(request(6, width=24, num_inference_steps=1), request_id="other")
    coming = [other]
    events = run(executor, *many, poll=lambda: executor.paint(coming.pop()) if coming else None)
    assert list(painted(events)) == [0, 1, 6, 2, 3, 4]


def test_a_batch_waits_for_the_pictures_of_a_request_that_are_on_their_way(
    tiny: tuple[Path, Any], executor: ImageExecutor
) -> None:
    coming = [replace(request(1), more=True), request(2)]
    executor.paint(replace(request(0), more=True))
    events: list[Any] = []
    executor.step(events.append, lambda: executor.paint(coming.pop(0)) if coming else None)
    assert [event.facts["batch"] for event in painted(events).values()] == [3, 3, 3]


def test_what_comes_while_texts_are_read_joins_the_batch(tiny: tuple[Path, Any], executor: ImageExecutor) -> None:
    """A list of prompts comes one by one; what has other work, or finds no room, is computed after it."""
    executor.info = replace(executor.info, max_batch=3)
    coming = [request(1, "a blue fox"), request(2, width=24), replace(request(3), more=True), request(4)]
    executor.paint(request(0))
    events: list[Any] = []
    while executor.busy:
        executor.step(events.append, lambda: executor.paint(coming.pop(0)) if coming else None)
    found = painted(events)
    assert {row: event.facts["batch"] for row, event in found.items()} == {0: 2, 1: 2, 2: 1, 3: 2, 4: 2}
    assert np.abs(pixels(found[1]) - direct(tiny[1], request(1, "a blue fox"))).max() <= 1


def test_no_batch_waits_for_a_request_that_was_given_up(executor: ImageExecutor) -> None:
    executor.paint(replace(request(0), more=True))
    events: list[Any] = []
    executor.step(events.append, lambda: executor.cancel(0, "cancelled"))
    assert [event.finish_reason for event in events] == ["cancelled"]
    assert not executor.busy


def test_no_batch_waits_for_one_that_was_refused(executor: ImageExecutor) -> None:
    executor.paint(replace(request(0), more=True))
    with pytest.raises(InvalidRequest, match="scheduler"):
        executor.paint(request(1, scheduler="NoScheduler"))
    events: list[Any] = []
    executor.step(events.append, lambda: None)
    assert list(painted(events)) == [0]


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_another_scheduler(tiny: tuple[Path, Any], executor: ImageExecutor, name: str) -> None:
    import diffusers

    pipe = tiny[1]
    own = pipe.scheduler
    asked = [request(0, scheduler=name), request(1, scheduler=name)]
    found = painted(run(executor, *asked))
    try:
        pipe.scheduler = getattr(diffusers, name).from_pretrained(tiny[0], subfolder="scheduler")
        for one in asked:
            assert np.abs(pixels(found[one.row_id]) - direct(pipe, one)).max() <= 1
    finally:
        pipe.scheduler = own
    again = painted(run(executor, request(0)))[0]  # the model's own is as before
    assert np.abs(pixels(again) - direct(pipe, request(0))).max() <= 1


def test_progress_and_previews(executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "PROGRESS_S", 0.0)
    events = run(executor, request(0, num_inference_steps=6, preview_steps=3), request(1, num_inference_steps=6))
    progress = [event for event in events if isinstance(event, PaintProgress) and event.row_id == 0]
    assert [event.step for event in progress] == sorted(event.step for event in progress)
    assert (progress[0].step, progress[-1].step, progress[-1].total) == (0, 6, 6)  # the first: it has begun
    shown = [event for event in progress if event.preview]
    assert [event.step for event in shown] == [3, 6]
    assert all(len(event.preview) == 3 * event.width * event.width == 3 * (SIZE // 2) ** 2 for event in shown)
    assert not any(event.preview for event in events if isinstance(event, PaintProgress) and event.row_id == 1)


def test_a_canceled_picture_ends_and_the_others_of_its_batch_go_on(
    tiny: tuple[Path, Any], executor: ImageExecutor
) -> None:
    asked = [request(0), request(1)]
    events = run(executor, *asked, poll=lambda: executor.cancel(0, "cancelled"))
    ends = [event for event in events if isinstance(event, FinishedEvent)]
    assert [(end.row_id, end.finish_reason) for end in ends] == [(0, "cancelled")]
    assert set(painted(events)) == {1}
    assert np.abs(pixels(painted(events)[1]) - direct(tiny[1], asked[1])).max() <= 1


def test_a_batch_that_nobody_wants_ends_between_two_steps(executor: ImageExecutor) -> None:
    polls = 0

    def cancel_in_the_third_step() -> None:
        nonlocal polls
        polls += 1
        if polls == 4:  # the first is before the steps
            for row_id in (0, 1):
                executor.cancel(row_id, "cancelled")

    asked = [request(row, num_inference_steps=200) for row in (0, 1)]
    events = run(executor, *asked, poll=cancel_in_the_third_step)
    assert polls == 4
    assert [type(event) for event in events if not isinstance(event, PaintProgress)] == [FinishedEvent] * 2
    assert len(painted(run(executor, request(2)))) == 1


def test_one_that_fails_leaves_the_others_of_its_batch(
    executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = executor.painter.embed

    def refusing(prompts: Any, negatives: Any, guidance: float) -> Any:
        if "BAD" in prompts:
            raise RuntimeError("boom")
        return embed(prompts, negatives, guidance)

    monkeypatch.setattr(executor.painter, "embed", refusing)
    events = run(executor, request(0), request(1, "BAD"), request(2))
    assert set(painted(events)) == {0, 2}
    (failure,) = (event for event in events if isinstance(event, FailedEvent))
    assert (failure.row_id, "RuntimeError" in failure.message) == (1, True)


def test_numbers_that_are_none_fail_the_picture_alone(executor: ImageExecutor) -> None:
    painter: Any = executor.painter
    bias = painter._pipe.vae.decoder.conv_out.bias
    with torch.no_grad():
        kept = bias.clone()
        bias.fill_(float("nan"))
    (failure,) = (event for event in run(executor, request(0)) if isinstance(event, FailedEvent))
    assert failure.error == "NonFinite"
    with torch.no_grad():
        bias.copy_(kept)
    assert len(painted(run(executor, request(1)))) == 1


@pytest.fixture
def together(executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures are decoded four at a time, as on a GPU: how many each time."""
    monkeypatch.setattr(executor, "_decoded_together", lambda work: 4)
    counts: list[int] = []
    decode = executor.painter.decode
    monkeypatch.setattr(executor.painter, "decode", lambda latents: counts.append(len(latents)) or decode(latents))
    return counts


def test_pictures_that_are_decoded_together_are_the_same(
    tiny: tuple[Path, Any], together: list[int], executor: ImageExecutor
) -> None:
    executor.info = replace(executor.info, max_batch=5)
    asked = [request(place) for place in range(5)]
    found = painted(run(executor, *asked))
    assert together == [4, 1]
    for one in asked:
        assert np.abs(pixels(found[one.row_id]) - direct(tiny[1], one)).max() <= 1
    times = [found[place].times["vae_s"] for place in range(5)]
    assert times[3] < times[4]  # until each was there


def test_a_picture_canceled_meanwhile_is_not_decoded(together: list[int], executor: ImageExecutor) -> None:
    executor.info = replace(executor.info, max_batch=5)

    def cancel() -> None:
        if together:
            executor.cancel(4, "cancelled")

    events = run(executor, *(request(place) for place in range(5)), poll=cancel)
    assert set(painted(events)) == {0, 1, 2, 3}
    assert together == [4]


def test_where_memory_is_short_pictures_are_decoded_one_by_one(
    executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "_decoded_together", lambda work: 4)
    decode, counts = executor.painter.decode, list[int]()

    def little(latents: torch.Tensor) -> Any:
        counts.append(len(latents))
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(latents)

    monkeypatch.setattr(executor.painter, "decode", little)
    assert len(painted(run(executor, *(request(place) for place in range(3))))) == 3
    assert counts == [2, 1, 1, 1]


def test_numbers_that_are_none_fail_one_picture_of_those_decoded_together(
    together: list[int], executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter: Any = executor.painter
    given = painter.pixels

    def spoiled(images: torch.Tensor) -> Any:
        images[1, 0, 0, 0] = float("inf")
        return given(images)

    monkeypatch.setattr(painter, "pixels", spoiled)
    events = run(executor, *(request(place) for place in range(4)))
    assert set(painted(events)) == {0, 2, 3}
    (failure,) = (event for event in events if isinstance(event, FailedEvent))
    assert (failure.row_id, failure.error) == (1, "NonFinite")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pixels_are_rounded_as_diffusers_does(executor: ImageExecutor, dtype: torch.dtype) -> None:
    painter: Any = executor.painter
    images = (torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 0.7).to(dtype)
    expected = painter._pipe.image_processor.postprocess(images.clone(), output_type="pil")
    for (found, flagged), picture in zip(painter.pixels(images), expected, strict=True):
        assert found == picture.tobytes()
        assert not flagged


def test_requests_that_are_alike_are_checked_and_read_once(
    executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    painter: Any = executor.painter
    cls = painter._classes[painter.scheduler]
    kept = cls.set_timesteps

    def counted(scheduler: Any, steps: int, *args: Any, **options: Any) -> None:
        made.append(steps)
        kept(scheduler, steps, *args, **options)

    monkeypatch.setattr(cls, "set_timesteps", counted)
    run(executor, *(request(place, num_inference_steps=3) for place in range(3)))
    assert len(made) == 2  # one to check, one to compute
    for _ in range(2):  # what is refused is refused again
        with pytest.raises(InvalidRequest):
            executor.paint(request(9, num_inference_steps=1000))


def test_what_cannot_be_served_is_refused_before_it_waits(executor: ImageExecutor) -> None:
    with pytest.raises(InvalidRequest, match="DDIMSchedule") as refused:
        executor.paint(request(0, scheduler="DDIMSchedule"))
    assert "DDIMScheduler" in refused.value.hint
    with pytest.raises(InvalidRequest, match="num_inference_steps: PNDMScheduler cannot do 1000"):
        executor.paint(request(0, num_inference_steps=1000))
    for row in range(6):
        executor.paint(request(row))
    with pytest.raises(QueueFull):
        executor.paint(request(6))
    for row in range(6):
        executor.cancel(row, "cancelled")
    assert len(run(executor)) == 6


def test_one_whose_time_has_passed_does_not_start(executor: ImageExecutor) -> None:
    late = replace(request(0), deadline=time.monotonic() - 1)
    events = run(executor, late, request(1))
    assert [event.error for event in events if isinstance(event, FailedEvent)] == ["DeadlineExceeded"]
    assert set(painted(events)) == {1}


def test_the_safety_checker_is_kept(tmp_path: Path) -> None:
    pipe = make_pipeline(tmp_path, safety=True)
    executor = load(tmp_path / "model")
    event = painted(run(executor, request(0)))[0]
    assert event.flagged
    assert np.abs(pixels(event) - direct(pipe, request(0))).max() == 0
    assert not pixels(event).any()


def test_weights_that_are_no_numbers_end_the_start(tmp_path: Path) -> None:
    pipe = make_pipeline(tmp_path)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0] = float("inf")
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    with pytest.raises(BrokenCheckpoint, match=r"unet/conv_in\.weight"):
        load(tmp_path / "model")
