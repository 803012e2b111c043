"""Pictures asked of an image executor in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miinb import models
from miinb.config import DeploymentConfig
from miinb.engine.diffusion import ImageExecutor
from miinb.engine.loading import load_executor
from miinb.engine.painting import Start, Work
from miinb.engine.pipeline_painter import load_images
from miinb.image_difference import psnr_db
from miinb.image_messages import PaintedEvent, PaintRequest, PaintSource
from miinb.image_params import ImageParams
from miinb.messages import EngineInfo, Phase, Plan
from tests.tiny_pipeline import SIZE


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


def start(folder: Path, state: Path, **fields: Any) -> tuple[ImageExecutor, list[Phase]]:
    """What a rank loads with this configuration, and the phases that it told."""
    phases: list[Phase] = []
    config = DeploymentConfig.parse({"model": str(folder), "device": "cpu", "options": {"threads": 1}} | fields)
    state.mkdir(exist_ok=True)
    loaded = load_executor(config, replica=0, rank=0, gpus=None, folder=state, report=phases.append)
    assert isinstance(loaded, ImageExecutor)
    return loaded, phases


def work(**changes: Any) -> Work:
    usual: dict[str, Any] = {"width": SIZE, "height": SIZE, "steps": 4, "guidance": 7.5, "scheduler": "PNDMScheduler"}
    return Work(**usual | changes)


def latents_of(executor: ImageExecutor, work: Work, starts: Sequence[Start | int], *texts: str) -> torch.Tensor:
    painter, seeds = executor.painter, [one if isinstance(one, Start) else Start(one) for one in starts]
    prompts = list(texts) or ["a red cat"] * len(seeds)
    conditions = painter.embed(prompts, ["blue"] * len(prompts), work.guidance)
    return painter.denoise(conditions, work, seeds, lambda step, latents: None)


def picture(executor: ImageExecutor, prompt: str = "a red cat", row_id: int = 0, **params: Any) -> np.ndarray:
    """The pixels of one picture."""
    (event,) = painted(run(executor, request(row_id, prompt, **{"seed": 10, **params}))).values()
    return pixels(event)


def psnr(image: np.ndarray, expected: np.ndarray) -> float:
    return psnr_db(float(((image - expected) ** 2).mean()))
