"""Small pictures that a run keeps, so that charts show what its arms made of the same prompts and seeds.

They are in the run's environment, under "pictures": a list of {arm, prompt_id, prompt, seed, webp}, `webp` in base64.
On disk each is a file of its own beside the run's `env.json`.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from miinb.bench.pixels import Pixels

#: Pixels of a thumbnail's longer side, and bytes that none has.
SIDE, MOST_BYTES = 192, 1 << 17
#: Pictures of each arm that a run keeps.
MOST = 4
FOLDER = "pictures"
_QUALITY = 82


def thumbnail(pixels: Pixels) -> str:
    """A picture [height, width, 3] as a small WebP, base64."""
    from PIL import Image

    small = Image.fromarray(pixels)
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def entry(
    arm: str, pixels: Pixels, *, prompt_id: str = "", prompt: str = "", seed: int | None = None
) -> dict[str, Any]:
    """What a run keeps of a picture of an arm."""
    return {"arm": arm, "prompt_id": prompt_id, "prompt": prompt, "seed": seed, "webp": thumbnail(pixels)}


def pictures_in(env: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Pixels]]:
    """What a run kept: the facts of each picture, and its pixels; what cannot be read is left out."""
    for one in _listed(env):
        pixels = _pixels(one)
        if pixels is not None:
            yield {name: value for name, value in one.items() if name != "webp"}, pixels


def without(env: Mapping[str, Any]) -> dict[str, Any]:
    """An environment with the pictures' facts but without their bytes, to be read by people."""
    facts = dict(env)
    if listed := _listed(env):
        facts["pictures"] = [{name: value for name, value in one.items() if name != "webp"} for one in listed]
    return facts


def unpacked(env: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """An environment whose pictures are files, and these files by their names."""
    files: dict[str, bytes] = {}
    facts, entries = dict(env), []
    for number, one in enumerate(_listed(env)):
        data = _bytes(one)
        if data is None:
            continue
        arm = re.sub(r"[^A-Za-z0-9._-]+", "-", str(one.get("arm")))[:40].strip(".-") or "arm"
        name = f"{number:02}-{arm}.webp"
        files[name] = data
        entries.append({**{key: value for key, value in one.items() if key != "webp"}, "file": name})
    if entries:
        facts["pictures"] = entries
    return facts, files


def packed(env: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The environment that `unpacked` took apart; a picture whose file is gone or too large is left out."""
    facts, entries = dict(env), []
    for one in _listed(env):
        name = str(one.get("file", ""))
        if Path(name).name != name or not name:
            entries += [one] if "webp" in one else []
            continue
        try:
            with (folder / FOLDER / name).open("rb") as stream:
                data = stream.read(MOST_BYTES + 1)
        except OSError:
            continue
        if len(data) <= MOST_BYTES:
            entries.append({**{k: v for k, v in one.items() if k != "file"}, "webp": base64.b64encode(data).decode()})
    if "pictures" in facts:
        facts["pictures"] = entries
    return facts


def _listed(env: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = env.get("pictures")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _bytes(one: Mapping[str, Any]) -> bytes | None:
    """The WebP of an entry, if it is one and small."""
    try:
        data = base64.b64decode(str(one.get("webp", "")), validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) <= MOST_BYTES else None


def _pixels(one: Mapping[str, Any]) -> Pixels | None:
    from PIL import Image, UnidentifiedImageError

    data = _bytes(one)
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            if max(image.size) > 4 * SIDE:  # its header promises more than a thumbnail is
                return None
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return None
