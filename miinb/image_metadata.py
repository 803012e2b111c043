"""What made a picture, inside its file: written by the frontend and for downloads, read for "the same once more".

Two forms stand beside each other: `parameters` as the A1111 web UI writes it, which viewers and other programs read,
and all that is known as JSON in `miinb`. In PNG they are text chunks, in WebP (and JPEG) they lie in EXIF.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miinb.errors import InvalidRequest
from miinb.image_params import MAX_PROMPT, ImageParams
from miinb.png_files import png_file
from miinb.samplers import sampler_of, scheduler_of

#: Bytes of a file that is read.
MAX_FILE = 64 << 20
WEBP_QUALITY = 90
#: EXIF's tags: where A1111 and its readers have a WebP's parameters, and where ours lie.
_EXIF_IFD, _USER_COMMENT, _DESCRIPTION = 0x8769, 0x9286, 0x010E
#: The parameters of `ImageParams` that a file may hold; width and height stand beside them.
_NAMES = ("negative_prompt", "num_inference_steps", "guidance_scale", "seed", "width", "height", "scheduler")
#: A1111's last line, and a name and value of it; the quoted ones may hold commas.
_LAST_LINE = re.compile(r"^Steps: \d+, ", re.MULTILINE)
_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
#: Names of that line that are taken over, have a note of their own, or say nothing of how the picture came about.
_TAKEN = frozenset(
    (
        *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model", "Model hash"),
        *("Denoising strength", "Source hash", "Mask", "Version", "VAE hash", "Lora hashes", "User"),
        *("Batch size", "Batch pos", "Created Date", "Civitai resources", "Civitai metadata"),
    )
)
#: Values that change nothing: what is done here as well.
_NEUTRAL = {("Clip skip", "1"), ("ENSD", "0"), ("RNG", "CPU"), ("VAE", "Automatic"), ("VAE", "None")}
_MOST_NAMED, _MOST_LETTERS = 12, 40
#: Networks that a prompt names, and what weighs or divides it: a bracket that is not escaped, or a word alone.
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,200}>")
_WEIGHED = re.compile(r"(?<!\\)[(\[]|\b(?:AND|BREAK)\b")


@dataclass(frozen=True, slots=True)
class MadeWith:
    """What a file says of how its picture was made.

    Attributes:
        prompt: the text.
        parameters: fields of `ImageParams`, each of them valid.
        model: what the file calls the model; "": nothing.
        notes: what of the file could not be taken over, a sentence each.
    """

    prompt: str
    parameters: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    notes: tuple[str, ...] = ()


# Writing


def parameters_text(values: Mapping[str, Any]) -> str:
    """What made a picture in the form of the A1111 web UI; `values` are those of the JSON."""
    negative = f"{_NEGATIVE} {values['negative_prompt']}\n" if values["negative_prompt"] else ""
    named = {
        "Steps": values["num_inference_steps"],
        "Sampler": sampler_of(values["scheduler"]),
        **({"Schedule type": values["schedule"]} if values.get("schedule") else {}),
        "CFG scale": values["guidance_scale"],
        "Seed": values["seed"],
        "Size": f"{values['width']}x{values['height']}",
        "Model": values["model"],
        **_source_named(values),
        "Version": f"miinb {values['version']}",
    }
    line = ", ".join(f"{name}: {value}" for name, value in named.items())
    return f"{values['prompt']}\n{negative}{line}".replace("\0", "\N{REPLACEMENT CHARACTER}")


def _source_named(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture was made from; its name may hold what ends a field there, and is in the JSON alone."""
    if "source" not in values:
        return {}
    covered = {"Mask": "yes"} if values["mask"] else {}
    hashed = values["source"]["sha256"][:10]
    return {"Denoising strength": values["strength"], "Source hash": hashed, **covered}


def encoded(pixels: NDArray[np.uint8], values: Mapping[str, Any], image_format: str) -> bytes:
    """A PNG or WebP file of a picture, with what made it inside. Takes up to seconds.

    Args:
        pixels: [height, width, 3], RGB.
        values: what made it, by the parameters' names.
        image_format: "png" or "webp".
    """
    from PIL import Image

    text = parameters_text(values)
    if image_format == "png":
        texts = {"parameters": text, "miinb": json.dumps(values, ensure_ascii=False)}
        return png_file(pixels, texts)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[_DESCRIPTION] = json.dumps(values)  # ASCII
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    Image.fromarray(pixels).save(buffer, "WEBP", quality=WEBP_QUALITY, exif=exif)
    return buffer.getvalue()


def converted(data: bytes, image_format: str) -> bytes:
    """A file that `encoded` made as one of the other format, with the same inside; of that format: itself."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        if str(image.format).lower() == image_format:
            return data
        return encoded(np.asarray(image.convert("RGB")), json.loads(_texts(image)[0]), image_format)


# Reading


def read_parameters(data: bytes) -> MadeWith:
    """What made the picture in a PNG, WebP or JPEG file of miinb's or the A1111 web UI's. No pixel is decoded.

    Raises:
        InvalidRequest: it is no such file, or says nothing of how it was made.
    """
    from PIL import Image

    if len(data) > MAX_FILE:
        raise InvalidRequest(f"The file has more than {MAX_FILE >> 20} MiB.", hint="Take the picture's own file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of EXIF that ends too early
            with Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG")) as image:
                told, text = _texts(image)
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, Image.DecompressionBombError):
        raise InvalidRequest("The file is no PNG, WebP or JPEG picture, or is damaged.") from None
    values = _from_json(told) or _from_a1111(text)
    if values is None:
        raise InvalidRequest(
            "The file does not say how its picture was made.",
            hint="Files of miinb and of the A1111 web UI do, unless another program has written them anew.",
        )
    return _checked(values)


def _texts(image: Any) -> tuple[str, str]:
    """Our JSON and A1111's text; "" for what is not there."""
    if image.format == "PNG":
        return tuple(str(image.info.get(name, "")) for name in ("miinb", "parameters"))  # type: ignore[return-value]
    exif = image.getexif()
    told = exif.get(_DESCRIPTION, "")
    return (told if isinstance(told, str) else ""), _comment(exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT, b""))


def _comment(data: Any) -> str:
    """EXIF's user comment: eight bytes say how the others are to be read."""
    if isinstance(data, str):
        return data.removeprefix("UNICODE\0").removeprefix("ASCII\0\0\0")
    if not isinstance(data, bytes):
        return ""
    kind, text = data[:8], data[8:]
    if kind != b"UNICODE\0":
        return text.decode("utf-8", "replace")
    little = text[1::2].count(0) > text[::2].count(0)
    return text.decode("utf-16-le" if little else "utf-16-be", "replace")


def _from_json(told: str) -> dict[str, Any] | None:
    try:
        values = json.loads(told)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        return None
    values.pop("untaken", None)  # notes of a text of A1111, which this is not
    return {name: value for name, value in values.items() if value not in ("", None) or name == "prompt"}


def _from_a1111(text: str) -> dict[str, Any] | None:
    places = [match.start() for match in _LAST_LINE.finditer(text)]
    if not places:
        return None
    head, line = text[: places[-1]], text[places[-1] :].split("\n", 1)[0]
    prompt, _, negative = head.partition(f"\n{_NEGATIVE}")
    if head.startswith(_NEGATIVE):
        prompt, negative = "", head.removeprefix(_NEGATIVE)
    pairs = {match[1].strip(): match[2].strip().strip('"') for match in _PAIR.finditer(line)}
    width, _, height = pairs.get("Size", "").partition("x")
    found: dict[str, Any] = {
        "num_inference_steps": _number(pairs.get("Steps", "")),
        "guidance_scale": _number(pairs.get("CFG scale", "")),
        "seed": _number(pairs.get("Seed", "")),
        "width": _number(width),
        "height": _number(height),
        "negative_prompt": negative.strip(),
        "scheduler": pairs.get("Sampler", ""),
        "schedule": pairs.get("Schedule type", ""),
        "model": pairs.get("Model", ""),
        "source": "Denoising strength" in pairs or None,
        "enlarged": any(name.startswith("Hires") for name in pairs) or None,
        "untaken": _untaken(pairs, f"{prompt}\n{negative}"),
    }
    return {"prompt": prompt.strip()} | {name: value for name, value in found.items() if value not in ("", None)}


def _untaken(pairs: Mapping[str, str], prompts: str) -> list[str]:
    """Notes on what else the picture of a text of A1111 depends on, and is not done here."""
    if pairs.get("Version", "").startswith("miinb "):  # where brackets are text
        return []
    if _number(pairs.get("Variation seed strength", "")) == 0:
        pairs = {name: value for name, value in pairs.items() if not name.startswith("Variation seed")}
    left = [
        f"{name[:_MOST_LETTERS]} {value[:_MOST_LETTERS]}".strip()
        for name, value in pairs.items()
        if name not in _TAKEN and not name.startswith("Hires") and (name, value) not in _NEUTRAL
    ]
    more = f" and {len(left) - _MOST_NAMED} more" if len(left) > _MOST_NAMED else ""
    notes = [f"Not taken over: {', '.join(left[:_MOST_NAMED])}{more}."] if left else []
    if networks := list(dict.fromkeys(_NETWORK.findall(prompts))):
        named = ", ".join(network[:_MOST_LETTERS] for network in networks[:_MOST_NAMED])
        notes.append(f"Networks of the prompt are not loaded, their names are read as text: {named}.")
    elif "Lora hashes" in pairs:
        notes.append(f"Not taken over: Lora {pairs['Lora hashes'][:_MOST_LETTERS]}.")
    if _WEIGHED.search(_NETWORK.sub("", prompts)):
        notes.append("Weights and parts of the prompt, like (word:1.3), [word] and BREAK, are read as plain text.")
    return notes


def _number(text: str) -> int | float | str:
    """A number where it is one; else the text, which is refused by its name later."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text[:40]


def _checked(values: Mapping[str, Any]) -> MadeWith:
    """What of the values is valid, and notes on the rest."""
    kept: dict[str, Any] = {}
    notes: list[str] = list(values.get("untaken", ()))
    if values.get("enlarged"):
        notes.append("It was enlarged by a second pass, which is not done here.")
    elif values.get("source"):
        notes.append("It was made from another picture, which the file does not hold.")
    for name in _NAMES:
        value = values.get(name)
        if name == "scheduler" and isinstance(value, str):
            value, said = scheduler_of(value, str(values.get("schedule", "")))
            notes += said
        if value in ("", None):
            continue
        try:
            value = getattr(ImageParams.parse({name: value}, error=InvalidRequest), name)
        except InvalidRequest as error:
            notes.append(f"Not taken over: {error.message}.".replace("..", "."))
        else:
            kept[name] = value
    if kept.get("negative_prompt") and kept.get("guidance_scale", 7.5) <= 1:
        del kept["negative_prompt"]
        notes.append("The negative prompt is left out: without guidance it does nothing.")
    prompt = _text(values["prompt"])
    if prompt != values["prompt"]:
        notes.append("Of the prompt characters that are none (lone surrogates) are replaced.")
    if len(prompt) > MAX_PROMPT:
        prompt = prompt[:MAX_PROMPT]
        notes.append(f"Of the prompt only the first {MAX_PROMPT} characters are taken over.")
    model = values.get("model", "")
    return MadeWith(prompt, kept, _text(model) if isinstance(model, str) else "", tuple(notes))


def _text(told: str) -> str:
    """What JSON calls a text, made one: a notebook cannot send lone surrogates to its page."""
    return re.sub(r"[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", told)
