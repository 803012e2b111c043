"""A stand-in for `Session` of text-to-image: landscapes drawn from their seeds, with real files and real parameters."""

from __future__ import annotations

import asyncio
import io
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from standin import StandIn

from miinb.image_messages import ImagesProgress, Picture
from miinb.image_metadata import encoded
from miinb.image_params import parse_images
from miinb.image_results import ImageResult, ImageTiming, pictures_result
from miinb.messages import Usage


def landscape(seed: int, width: int, height: int, brighter: int = 0) -> Image.Image:
    """A sky, a sun and hills; every seed has its own."""
    drawn = random.Random(seed)
    top, low = ([drawn.randrange(30, 226) for _ in range(3)] for _ in range(2))
    rows = Image.linear_gradient("L").resize((width, height))
    ends = (Image.new("RGB", (width, height), tuple(color)) for color in (low, top))
    image = Image.composite(*ends, rows)
    draw = ImageDraw.Draw(image)
    x, y, r = drawn.uniform(0.2, 0.8) * width, drawn.uniform(0.15, 0.4) * height, width // 10
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 240, 200))
    for level in (0.6, 0.75, 0.9):
        points = [(i * width / 8, (level + drawn.uniform(-0.08, 0.08)) * height) for i in range(9)]
        shade = tuple(round(color * (1.1 - level)) for color in top)
        draw.polygon([*points, (width, height), (0, height)], fill=shade)
    return image.point(lambda value: min(255, value + brighter)) if brighter else image


@dataclass
class ImageStandIn(StandIn):
    task: str = "text-to-image"
    side: int = 32
    brighter: int = 0  # of every color, as another engine's pictures differ a little
    step_s: float = 0.0
    flags: bool = False
    warning: str = ""
    preview: bytes = b""
    gate: threading.Event | None = None
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def agenerate(
        self,
        prompt: str,
        on_progress: Callable[[ImagesProgress], object] = lambda progress: None,
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> ImageResult:
        self.asked.append((prompt, parameters))
        params = parse_images(parameters)
        steps = params.num_inference_steps
        for step in range(1, steps + 1):
            while self.gate is not None and not self.gate.is_set():
                await asyncio.sleep(0.005)
            await asyncio.sleep(self.step_s)
            shown = self.preview if params.preview_steps and step % params.preview_steps == 0 else b""
            on_progress(ImagesProgress(step, steps, shown))
        first = params.seed if params.seed is not None else 1
        pictures = []
        for place in range(params.num_images_per_prompt):
            width, height, seed = params.width or self.side, params.height or self.side, first + place
            values = {**params.model_dump(), "prompt": prompt, "negative_prompt": params.negative_prompt or ""}
            values |= {"seed": seed, "width": width, "height": height, "model": "tiny", "version": "1"}
            values["scheduler"] = params.scheduler or "PNDMScheduler"
            data = encoded(np.asarray(landscape(seed, width, height, self.brighter)), values, params.image_format)
            pictures.append(Picture(place, data, seed, width, height, self.flags))
        e2e_s, count = self.e2e_s, len(pictures)
        timing = ImageTiming(
            model_s=0.9 * e2e_s,
            e2e_s=e2e_s,
            text_encode_s=0.012,
            steps_s=0.85 * e2e_s,
            vae_s=0.04 * e2e_s,
            picture_s=0.02 * e2e_s,
            s_per_image=e2e_s / count,
        )
        warnings = (self.warning,) if self.warning else ()
        return pictures_result(prompt, pictures, timing, usage=Usage(prompt_tokens=5), warnings=warnings)


def jpeg() -> bytes:
    """A preview."""
    buffer = io.BytesIO()
    landscape(0, 64, 64).save(buffer, "JPEG")
    return buffer.getvalue()
