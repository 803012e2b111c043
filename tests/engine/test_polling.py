"""Cancels of pictures within what the models compute on a CPU, by both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miinb.engine import diffusion, image_blocks, polling
from miinb.engine.diffusion import ImageExecutor
from miinb.image_messages import PaintedEvent, PaintProgress, PaintRequest, PaintSource
from miinb.messages import FailedEvent, FinishedEvent
from tests.engine.image_rows import painted, picture, pixels, request, run, start
from tests.tiny_pipeline import SIZE


@pytest.fixture(scope="module", params=["optimized", "baseline"])
def loaded(
    request: pytest.FixtureRequest, pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ImageExecutor]:
    executor, _ = start(pipeline_folder, tmp_path_factory.mktemp("state"), engine=request.param, max_batch=4)
    yield executor
    executor.close()


@pytest.fixture
def executor(loaded: ImageExecutor, monkeypatch: pytest.MonkeyPatch) -> ImageExecutor:
    """Polled at each point, telling each step."""
    monkeypatch.setattr(polling, "EVERY_S", 0.0)
    monkeypatch.setattr(polling, "_due", 0.0)
    monkeypatch.setattr(diffusion, "PROGRESS_S", 0.0)
    return loaded


def within(executor: ImageExecutor, name: str, monkeypatch: pytest.MonkeyPatch, points: int) -> Callable[[], bool]:
    """Whether a method of the painter has begun, and has passed so many points and not ended."""
    method, left = getattr(executor.painter, name), -1

    def marked(*args: Any) -> Any:
        nonlocal left
        left = points
        found = method(*args)
        left = -1
        return found

    def passed() -> bool:
        nonlocal left
        left = max(left - 1, -1)
        return left == 0

    monkeypatch.setattr(executor.painter, name, marked)
    return passed


def canceling(executor: ImageExecutor, when: Callable[[], bool], *row_ids: int) -> Callable[[], None]:
    """A poll that cancels rows."""

    def poll() -> None:
        if when():
            for row_id in row_ids:
                executor.cancel(row_id, "cancelled")

    return poll


IMAGE = PaintSource(np.random.default_rng(0).integers(0, 256, 3 * SIZE * SIZE, np.uint8).tobytes())
FROM_TEXT: dict[str, Any] = {"prompt": "the blue moon"}  # which no other test has read before
FROM_IMAGE: dict[str, Any] = {"source": IMAGE, "strength": 0.75, "width": SIZE, "height": SIZE}
#: The third point of a beginning is in the VAE's encoder.
CASES = {
    "text": ("embed", 2, FROM_TEXT),
    "first convolution": ("denoise", 1, FROM_TEXT),
    "step": ("denoise", 12, FROM_TEXT),
    "encode": ("denoise", 3, FROM_IMAGE),
    "decode": ("decode", 5, FROM_TEXT),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_what_nobody_wants_ends_within_it(
    executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch, case: tuple[str, int, dict[str, Any]]
) -> None:
    name, points, origin = case
    expected = picture(executor)
    with monkeypatch.context() as patch:
        when = within(executor, name, patch, points)
        asked = [request(row_id, **origin) for row_id in (1, 2)]
        events = run(executor, *asked, poll=canceling(executor, when, 1, 2))
    assert [event.row_id for event in events if isinstance(event, FinishedEvent)] == [1, 2]
    steps = [event.step for event in events if isinstance(event, PaintProgress)]
    assert (max(steps, default=0) == 0) == (name != "decode")
    assert not any(isinstance(event, PaintedEvent) for event in events)
    assert not executor.busy
    assert np.array_equal(picture(executor), expected)  # nothing is left behind


def test_a_batch_of_which_one_is_wanted_goes_on(executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = pixels(painted(run(executor, request(2)))[2])
    when = within(executor, "denoise", monkeypatch, 4)
    events = run(executor, request(1), request(2), poll=canceling(executor, when, 1))
    assert [event.row_id for event in events if isinstance(event, FinishedEvent)] == [1]
    assert np.abs(pixels(painted(events)[2]) - alone).max() <= 1


def test_one_canceled_within_its_decoding_leaves_the_others(
    executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, begun = within(executor, "decode", monkeypatch, 3), []

    def first() -> bool:
        begun.extend([1] if decode() else [])
        return len(begun) == 1

    events = run(executor, request(1), request(2), poll=canceling(executor, first, 1))
    assert [event.row_id for event in events if isinstance(event, FinishedEvent)] == [1]
    assert list(painted(events)) == [2]
    assert not any(isinstance(event, FailedEvent) for event in events)


def test_requests_come_in_within_a_step(executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    when, late = within(executor, "denoise", monkeypatch, 4), [request(2, "a blue fox", num_inference_steps=3)]
    expected = [picture(executor), picture(executor, "a blue fox", seed=12, num_inference_steps=3)]
    events = run(executor, request(0), poll=lambda: executor.paint(late.pop()) if late and when() else None)
    found = painted(events)
    assert [np.abs(pixels(found[row]) - one).max() <= 1 for row, one in zip((0, 2), expected, strict=True)] == [
        True
    ] * 2


def test_a_gpu_is_not_polled_within_steps(loaded: ImageExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "EVERY_S", 0.0)
    monkeypatch.setattr(loaded, "_wait", lambda: None)
    polls = []

    def count(asked: PaintRequest) -> int:
        polls.clear()
        run(loaded, asked, poll=lambda: polls.append(1))
        return len(polls)

    on_cpu = count(request(0))
    monkeypatch.setattr(loaded, "info", replace(loaded.info, device="cuda"))
    assert count(request(0)) < 10 < on_cpu  # before the steps, and after each


def test_points_outside_do_nothing_and_within_are_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    polls: list[int] = []
    polling.poll_point()
    assert polling.parts_of(1e15) == 1
    with polling.polled(lambda: polls.append(1)):
        assert polling.parts_of(1e6) == 1
        assert polling.parts_of(3 * polling.MOST_OPERATIONS) == 3
        for _ in range(1000):
            polling.poll_point()
    assert len(polls) <= 2
    polling.poll_point()
    assert polling.parts_of(1e15) == 1


def in_parts(compute: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, int]:
    """What is computed in many parts, and how many points it has."""
    points: list[int] = []
    with monkeypatch.context() as patch, polling.polled(lambda: points.append(1)):
        patch.setattr(polling, "EVERY_S", 0.0)
        patch.setattr(polling, "_due", 0.0)
        patch.setattr(polling, "MOST_OPERATIONS", 5e3)
        return compute(), len(points)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_convolutions_in_bands_are_the_same(side: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if packed and not image_blocks.can_pack(torch.float32):
        pytest.skip("this PyTorch has no layout of oneDNN's")
    draw = torch.Generator().manual_seed(side)
    x = torch.randn((2, 13, 9, 16), generator=draw)
    weight = torch.randn((8, 16, side, side), generator=draw).contiguous(memory_format=torch.channels_last)
    weight, bias = image_blocks._packed(weight) if packed else weight, torch.randn(8, generator=draw)
    with torch.inference_mode():
        for some in (None, bias):
            whole = image_blocks.convolve(x, weight, some)
            bands, points = in_parts(lambda some=some: image_blocks.convolve(x, weight, some), monkeypatch)
            assert points > 10
            torch.testing.assert_close(bands, whole, rtol=1e-6, atol=1e-5)


def test_attention_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_blocks, "_LEAST_QUERIES", 16)
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn((2, 50, 96), generator=draw).chunk(3, -1)
    whole = image_blocks.attention(q, k, v, heads=4)
    parts, points = in_parts(lambda: image_blocks.attention(q, k, v, heads=4), monkeypatch)
    assert points == 1 + 2 * 4  # of 16, 16, 16 and 2 queries
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
