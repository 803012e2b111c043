"""What made a picture goes into its file and comes out again; other programs' files, and broken ones."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from miinb.errors import InvalidRequest
from miinb.image_metadata import MadeWith, converted, encoded, parameters_text, read_parameters
from miinb.samplers import SAMPLERS, sampler_of

VALUES: dict[str, Any] = {
    "prompt": "a cat,\nNegative prompt: not this 😀",
    "negative_prompt": "dogs, rain",
    "num_inference_steps": 20,
    "guidance_scale": 6.5,
    "seed": 7,
    "width": 16,
    "height": 24,
    "scheduler": "DDIMScheduler",
    "model": "tiny",
    "version": "1.0",
}
A1111 = """a castle, \\(old\\)
second line
Negative prompt: blurry,
text
Steps: 28, Sampler: {sampler}, CFG scale: 7, Seed: 4294967295, Size: 512x768, Model hash: 6ce0161689, Model: v1-5, \
Civitai resources: "x: abc, Seed: 9", Version: v1.9.4"""


def plain_png(**texts: str) -> bytes:
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for name, text in texts.items():
        info.add_itxt(name, text)
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_what_is_written_is_read(kind: str) -> None:
    data = encoded(np.asarray(Image.new("RGB", (16, 24), "red")), VALUES, kind)
    made = read_parameters(data)
    kept = {name: value for name, value in VALUES.items() if name not in ("prompt", "model", "version")}
    assert made == MadeWith(VALUES["prompt"], kept, "tiny")
    other = "webp" if kind == "png" else "png"
    again = converted(data, other)
    assert read_parameters(again) == made
    assert converted(data, kind) is data
    assert Image.open(io.BytesIO(again)).format == other.upper()


def test_a_png_made_of_a_png_keeps_its_pixels_and_both_forms() -> None:
    data = encoded(np.asarray(Image.new("RGB", (16, 24), (1, 2, 3))), VALUES, "png")
    with Image.open(io.BytesIO(data)) as image:
        assert image.getpixel((0, 0)) == (1, 2, 3)
        assert image.info["parameters"] == parameters_text(VALUES)
        assert json.loads(image.info["miinb"]) == VALUES


NO_SUCH = "No scheduler here computes"


@pytest.mark.parametrize(
    ("sampler", "scheduler", "note"),
    [
        ("Euler a", "EulerAncestralDiscreteScheduler", ""),
        ("Euler", "EulerDiscreteScheduler", ""),
        ("DDIM", "DDIMScheduler", ""),
        ("PNDM", "PNDMScheduler", ""),
        ("PLMS", "PNDMScheduler", ""),
        ("LMS", "LMSDiscreteScheduler", ""),
        ("LMS Karras", "LMSDiscreteScheduler", "noise schedule is not"),
        ("Heun", "HeunDiscreteScheduler", ""),
        ("DPM2", "KDPM2DiscreteScheduler", ""),
        ("DPM2 a Karras", "KDPM2AncestralDiscreteScheduler", "noise schedule is not"),
        ("UniPC", "UniPCMultistepScheduler", ""),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", "noise schedule is not"),
        ("DPM++ 2M SGM Uniform", "DPMSolverMultistepScheduler", "noise schedule is not"),
        ("DPM++ SDE", "DPMSolverSDEScheduler", ""),
        ("DPM++ SDE Karras", "DPMSolverSDEScheduler", "noise schedule is not"),
        ("Euler Beta", "EulerDiscreteScheduler", "noise schedule is not"),
        ("DPM++ 2M Align Your Steps", "DPMSolverMultistepScheduler", "noise schedule is not"),
        ("Euler a, Schedule type: Beta", "EulerAncestralDiscreteScheduler", "schedule (Beta) is not"),
        ("Euler a Foo", "EulerAncestralDiscreteScheduler", "Of the sampler 'Euler a Foo' only 'Euler a' is known"),
        ("Euler a CFG++", None, NO_SUCH),
        ("Eulerish", None, "'Eulerish' is not known here"),
        ("DPM++ 2M, Schedule type: Karras", "DPMSolverMultistepScheduler", "schedule (Karras) is not"),
        ("DPM++ 2M, Schedule type: Automatic", "DPMSolverMultistepScheduler", "schedule (Automatic) is not"),
        ("Euler, Schedule type: Automatic", "EulerDiscreteScheduler", ""),
        ("DDIM, Schedule type: Uniform", "DDIMScheduler", ""),
        ("PNDMScheduler", "PNDMScheduler", ""),
        ("DPM++ 2M SDE Karras", None, f"{NO_SUCH} what the sampler 'DPM++ 2M SDE Karras' does: the model's own is "),
        ("DPM++ 2S a", None, "taken; DPMSolverSinglestepScheduler is most like it."),
        ("Restart", None, NO_SUCH),
        ("LCM", None, NO_SUCH),
        ("Foo", None, "'Foo' is not known here: the model's own is taken"),
    ],
)
def test_files_of_a1111_are_read(sampler: str, scheduler: str | None, note: str) -> None:
    made = read_parameters(plain_png(parameters=A1111.format(sampler=sampler)))
    assert made.prompt == "a castle, \\(old\\)\nsecond line"
    assert made.model == "v1-5"
    assert made.parameters == {
        "negative_prompt": "blurry,\ntext",
        "num_inference_steps": 28,
        "guidance_scale": 7,
        "seed": 4294967295,
        "width": 512,
        "height": 768,
        **({"scheduler": scheduler} if scheduler else {}),
    }
    assert note in " ".join(made.notes)
    assert bool(made.notes) == bool(note)


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
def test_comments_of_either_byte_order_and_in_jpeg(order: str) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.format(sampler="Heun").encode(order)
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=exif)
    made = read_parameters(buffer.getvalue())
    assert made.parameters["scheduler"] == "HeunDiscreteScheduler"


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ("Denoising strength: 0.7", "made from another picture"),
        ("Denoising strength: 0.5, Hires upscale: 2", "enlarged by a second pass"),
    ],
)
def test_what_more_it_took_is_told(more: str, note: str) -> None:
    made = read_parameters(plain_png(parameters=A1111.format(sampler="Euler") + ", " + more))
    assert len(made.notes) == 1
    assert note in made.notes[0]
    ours = read_parameters(plain_png(miinb=json.dumps({**VALUES, "source": {"name": "a.png"}})))
    assert "made from another picture" in ours.notes[0]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("Clip skip: 2", ["Clip skip 2"]),
        ("Clip skip: 1", []),
        ("Variation seed: 5, Variation seed strength: 0.2", ["Variation seed 5", "Variation seed strength 0.2"]),
        ("Variation seed: 5, Variation seed strength: 0", []),
        ("Refiner: xl_refiner [7440042bbd], Refiner switch at: 0.8", ["Refiner xl_refiner", "Refiner switch at 0.8"]),
        ("ENSD: 31337", ["ENSD 31337"]),
        ("Eta: 0.5", ["Eta 0.5"]),
        ("VAE hash: 735e4c3a44, VAE: ft-mse.safetensors", ["VAE ft-mse.safetensors"]),
        ("RNG: CPU, VAE: Automatic", []),
        ("Something new: yes", ["Something new yes"]),
        ('Lora hashes: "x: abc"', ["Lora x: abc"]),
    ],
)
def test_what_else_a_picture_of_a1111_depends_on_is_told(more: str, named: list[str]) -> None:
    made = read_parameters(plain_png(parameters=A1111.format(sampler=f"Euler, {more}")))
    assert made.parameters["scheduler"] == "EulerDiscreteScheduler"
    assert len(made.notes) == bool(named)
    for name in named:
        assert made.notes[0].startswith("Not taken over: ")
        assert name in made.notes[0]


@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        ("a cat <lora:ink_v2:0.8>, <lyco:b:1>", "are not loaded, their names are read as text: <lora:ink_v2:0.8>, <ly"),
        ("a (cat:1.3)", "Weights and parts of the prompt, like (word:1.3)"),
        ("a [cat]", "Weights and parts of the prompt"),
        ("a cat BREAK a dog", "Weights and parts of the prompt"),
        ("a cat\nNegative prompt: (blurry:1.2)", "Weights and parts of the prompt"),
        ("a BREAKFAST \\(oil\\)", ""),
    ],
)
def test_what_a1111_does_with_words_of_a_prompt_is_told(prompt: str, note: str) -> None:
    line = "Steps: 28, Sampler: Euler, CFG scale: 7, Seed: 4, Size: 512x768, Version: v1.9.4"
    made = read_parameters(plain_png(parameters=f"{prompt}\n{line}"))
    assert made.prompt == prompt.split("\n")[0]
    assert len(made.notes) == bool(note)
    assert note in "".join(made.notes)
    ours = read_parameters(plain_png(parameters=f"{prompt}\n{line.replace('v1.9.4', 'miinb 1.0')}"))
    assert ours.notes == ()


@pytest.mark.parametrize("schedule", ["", "Karras"])
@pytest.mark.parametrize("scheduler", [*sorted(set(SAMPLERS.values())), "EDMEulerScheduler"])
def test_the_text_names_samplers_as_a1111_does_and_gives_the_same_back(scheduler: str, schedule: str) -> None:
    values = VALUES | {"scheduler": scheduler, "prompt": "a cat"} | ({"schedule": schedule} if schedule else {})
    text = parameters_text(values)
    named = sampler_of(scheduler)
    told = f"Sampler: {named}, Schedule type: Karras, CFG" if schedule else f"Sampler: {named}, CFG"
    assert told in text
    from_text = read_parameters(plain_png(parameters=text))
    from_json = read_parameters(plain_png(miinb=json.dumps(values), parameters=text))
    assert from_text.parameters == from_json.parameters
    assert from_json.parameters["scheduler"] == scheduler
    assert from_json.notes == ()


def test_a1111s_own_names_of_samplers() -> None:
    named = {"EulerDiscreteScheduler": "Euler", "EulerAncestralDiscreteScheduler": "Euler a", "PNDMScheduler": "PLMS"}
    named |= {"DPMSolverMultistepScheduler": "DPM++ 2M", "DPMSolverSDEScheduler": "DPM++ SDE"}
    assert {scheduler: sampler_of(scheduler) for scheduler in named} == named
    assert sampler_of("EDMEulerScheduler") == "EDMEulerScheduler"


def test_notes_of_a_text_come_of_a_text_alone() -> None:
    made = read_parameters(plain_png(miinb=json.dumps({**VALUES, "untaken": ["x", 3]})))
    assert made.notes == ()


def test_what_cannot_be_set_here_is_named_and_left_out() -> None:
    values = {**VALUES, "seed": -4, "width": 513, "num_inference_steps": "many", "guidance_scale": 1, "scheduler": 3}
    made = read_parameters(plain_png(miinb=json.dumps(values)))
    assert made.parameters == {"guidance_scale": 1, "height": 24}
    told = " ".join(made.notes)
    for name in ("seed", "width", "num_inference_steps", "scheduler", "negative prompt"):
        assert name in told


def test_ours_comes_before_the_text_and_a_broken_one_falls_back() -> None:
    text = A1111.format(sampler="DDIM")
    assert read_parameters(plain_png(miinb=json.dumps(VALUES), parameters=text)).prompt == VALUES["prompt"]
    for broken in ("[" * 100_000, "{", "[1]", '{"prompt": 3}'):
        assert read_parameters(plain_png(miinb=broken, parameters=text)).prompt.startswith("a castle")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no PNG"),
        (b"GIF89a" + bytes(40), "no PNG"),
        (plain_png()[:20], "no PNG"),
        (plain_png(parameters="a cat in a hat"), "does not say"),
        (plain_png(), "does not say"),
        (bytes((64 << 20) + 1), "64 MiB"),
    ],
)
def test_other_files_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_parameters(data)


def test_values_are_of_their_own_kinds() -> None:
    values = {"prompt": "a", "guidance_scale": 6, "seed": 12, "num_inference_steps": float("nan"), "height": "16"}
    made = read_parameters(plain_png(miinb=json.dumps(values)))
    assert made.parameters == {"guidance_scale": 6.0, "seed": 12}
    assert isinstance(made.parameters["guidance_scale"], float)
    assert all(name in " ".join(made.notes) for name in ("num_inference_steps", "height"))


def test_a_text_that_unpacks_to_a_bomb_is_refused() -> None:
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt("parameters", "a" * (32 << 20), zip=True)
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    assert len(buffer.getvalue()) < 1 << 20
    with pytest.raises(InvalidRequest):
        read_parameters(buffer.getvalue())
