"""Pixels made into files, with what made them inside. Work of up to seconds: for threads, not for the loop."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np

import miinb
from miinb.image_messages import ImagesRequest, PaintedEvent, PaintProgress
from miinb.image_metadata import encoded

_PREVIEW_QUALITY = 80


def picture_file(event: PaintedEvent, request: ImagesRequest, model: str) -> bytes:
    """A PNG or WebP file of a picture.

    Args:
        event: its pixels, size and seed.
        request: what asked for it.
        model: the model's folder or hub name; of a folder only its own name is told.
    """
    pixels = np.frombuffer(event.pixels, np.uint8).reshape(event.height, event.width, 3)
    return encoded(pixels, facts(event, request, model), request.params.image_format)


def preview_file(event: PaintProgress) -> bytes:
    """A small JPEG of a preview's pixels; b"" where there are none."""
    if not event.preview:
        return b""
    from PIL import Image

    buffer = io.BytesIO()
    size = (event.width, len(event.preview) // (3 * event.width))
    Image.frombytes("RGB", size, event.preview).save(buffer, "JPEG", quality=_PREVIEW_QUALITY)
    return buffer.getvalue()


def facts(event: PaintedEvent, request: ImagesRequest, model: str) -> dict[str, Any]:
    """What makes a picture again, by the parameters' names; of one that it was made from what tells it apart."""
    params = request.params
    values = {
        "prompt": request.prompt,
        "negative_prompt": params.negative_prompt or "",
        "num_inference_steps": params.num_inference_steps,
        "guidance_scale": params.guidance_scale,
        "seed": event.seed,
        "width": event.width,
        "height": event.height,
        "scheduler": event.scheduler,
        "model": Path(model).name if model.startswith(("/", ".", "~")) else model,
        "version": miinb.__version__,
    }
    if event.schedule:
        values["schedule"] = event.schedule
    if request.image is None:
        return values
    data = request.image.data
    source = {"name": request.image.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return values | {"strength": params.strength, "source": source, "mask": request.mask is not None}
