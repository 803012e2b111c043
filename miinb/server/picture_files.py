"""Pixels made into files, with what made them inside. Work of up to seconds: for threads, not for the loop."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import miinb
from miinb.image_messages import ImagesRequest, PaintedEvent, PaintProgress

#: zlib's level for PNG: the higher ones take several times as long for a few percent.
_PNG_LEVEL = 3
_WEBP_QUALITY = 90
_PREVIEW_QUALITY = 80
#: EXIF's tags: where A1111 and its readers have a WebP's parameters, and where ours lie.
_EXIF_IFD, _USER_COMMENT, _DESCRIPTION = 0x8769, 0x9286, 0x010E


def picture_file(event: PaintedEvent, request: ImagesRequest, model: str) -> bytes:
    """A PNG or WebP file of a picture.

    Args:
        event: its pixels, size and seed.
        request: what asked for it.
        model: the model's folder or hub name; of a folder only its own name is told.
    """
    from PIL import Image, PngImagePlugin

    image = Image.frombytes("RGB", (event.width, event.height), event.pixels)
    values = facts(event, request, model)
    text = parameters_text(values)
    told = json.dumps(values, ensure_ascii=False)
    buffer = io.BytesIO()
    if request.params.image_format == "webp":
        exif = Image.Exif()
        exif[_DESCRIPTION] = json.dumps(values)  # ASCII
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
        image.save(buffer, "WEBP", quality=_WEBP_QUALITY, exif=exif)
    else:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", text)
        info.add_itxt("miinb", told)
        image.save(buffer, "PNG", pnginfo=info, compress_level=_PNG_LEVEL)
    return buffer.getvalue()


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
    if request.image is None:
        return values
    data = request.image.data
    source = {"name": request.image.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return values | {"strength": params.strength, "source": source, "mask": request.mask is not None}


def parameters_text(values: dict[str, Any]) -> str:
    """The same in the form of the A1111 web UI, which other programs read."""
    negative = f"Negative prompt: {values['negative_prompt']}\n" if values["negative_prompt"] else ""
    named = {
        "Steps": values["num_inference_steps"],
        "Sampler": values["scheduler"],
        "CFG scale": values["guidance_scale"],
        "Seed": values["seed"],
        "Size": f"{values['width']}x{values['height']}",
        "Model": values["model"],
        **_source_named(values),
        "Version": f"miinb {values['version']}",
    }
    line = ", ".join(f"{name}: {value}" for name, value in named.items())
    return f"{values['prompt']}\n{negative}{line}".replace("\0", "\N{REPLACEMENT CHARACTER}")


def _source_named(values: dict[str, Any]) -> dict[str, Any]:
    """What a picture was made from; its name may hold what ends a field there, and is in the JSON alone."""
    if "source" not in values:
        return {}
    covered = {"Mask": "yes"} if values["mask"] else {}
    hashed = values["source"]["sha256"][:10]
    return {"Denoising strength": values["strength"], "Source hash": hashed, **covered}
