"""Pictures asked of an image executor in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from miinb import models
from miinb.config import DeploymentConfig
from miinb.engine.diffusion import ImageExecutor
from miinb.engine.pipeline_painter import load_images
from miinb.image_messages import PaintedEvent, PaintRequest, PaintSource
from miinb.image_params import ImageParams
from miinb.messages import EngineInfo, Plan


def load(folder: Path, max_batch: int = 4) -> ImageExecutor:
    plan = Plan("baseline", "cpu", "fp32")
    info = EngineInfo(0, "m", "text-to-image", "baseline", "fp32", "cpu", 9, 16, max_batch, (), "", plan)
    config = DeploymentConfig.parse({"model": str(folder), "options": {"max_queue": 6}})
    return load_images(models.inspect(folder), config, info, lambda phase: None)


def request(
    row_id: int, prompt: str = "a red cat", *, source: PaintSource | None = None, **params: Any
) -> PaintRequest:
    values = {"num_inference_steps": 4, "seed": 10 + row_id, **params}
    return PaintRequest(row_id, prompt, ImageParams(**values), time.monotonic(), source=source)


def run(executor: ImageExecutor, *requests: PaintRequest, poll: Callable[[], None] = lambda: None) -> list[Any]:
    for one in requests:
        executor.paint(one)
    events: list[Any] = []
    while executor.busy:
        executor.step(events.append, poll)
    return events


def painted(events: list[Any]) -> dict[int, PaintedEvent]:
    return {event.row_id: event for event in events if isinstance(event, PaintedEvent)}


def pixels(event: PaintedEvent) -> np.ndarray:
    return np.frombuffer(event.pixels, np.uint8).reshape(event.height, event.width, 3).astype(int)
