"""The training of the tiny image model, for seconds: a folder that diffusers and the engine read; and resumed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from miinb.demo import image_parts, train_images
from miinb.demo.shapes import COLORS, KINDS, scenes
from miinb.engine.diffusion_spec import unet_spec, vae_spec
from miinb.engine.unet_weights import load_unet
from miinb.engine.vae import load_vae
from miinb.models import inspect
from tests.engine.tiny_images import distance


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    small = dataclasses.replace(image_parts.SIZES["small"], pictures=48, vae_batch=2, unet_batch=2)
    monkeypatch.setitem(image_parts.SIZES, "small", small)
    monkeypatch.setattr(train_images, "STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["train_images", "--device", "cpu", *words])
    train_images.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "--minutes", "0.04", "--out", str(folder / "model"), "--work", str(folder / "work"))
    return folder


def test_the_folder_is_whole(trained: Path) -> None:
    model = trained / "model"
    assert {"text-to-image"} == set(inspect(model).tasks)
    facts = json.loads((model / "provenance.json").read_text())
    assert facts["trained"]["vae"]["steps"] > 0
    assert facts["trained"]["unet"]["steps"] > 0
    assert len(facts["judgments"]) == 24
    assert facts["right"] == sum(one["right"] for one in facts["judgments"])
    assert {"license", "date", "seed", "torch", "diffusers", "hardware", "parameters"} <= set(facts)
    assert sum(file.stat().st_size for file in model.rglob("*") if file.is_file()) < 6_000_000
    with Image.open(model / "sheet.png") as sheet:
        assert sheet.size == (12 * 64, 2 * 64)


def test_the_engine_computes_it(trained: Path) -> None:
    """Its own UNet and VAE decoder agree with diffusers'."""
    model = trained / "model"
    pipe: Any = StableDiffusionPipeline.from_pretrained(model)
    torch.manual_seed(2)
    size = pipe.unet.config.sample_size
    latents, text = torch.randn(2, 4, size, size), torch.randn(2, image_parts.TEXT_LENGTH, 64)
    times = torch.tensor([999, 500])
    cpu = torch.device("cpu")
    unet = load_unet(model / "unet", dtype=torch.float32, device=cpu)
    found = unet.step(latents, torch.tensor([1]), unet.prepare(text, times))
    with torch.no_grad():
        assert distance(found, pipe.unet(latents, 500, text).sample) < 1e-4
        decoder = load_vae(model / "vae", dtype=torch.float32, device=cpu)
        assert distance(decoder.decode(latents), pipe.vae.decode(latents).sample) < 1e-4


@pytest.mark.parametrize("name", list(image_parts.SIZES))
def test_the_engine_knows_every_size(name: str) -> None:
    sizes = image_parts.SIZES[name]
    unet, vae = image_parts.make_unet(sizes), image_parts.make_vae(sizes)
    assert unet_spec(unet.config).text_width == sizes.text
    assert vae_spec(vae.config).scale * unet.config.sample_size == sizes.pixels
    assert 2 * sum(values.numel() for part in (unet, vae) for values in part.parameters()) < 12_000_000  # in fp16


def test_a_run_goes_on_from_its_checkpoints(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = json.loads((trained / "model" / "provenance.json").read_text())["trained"]
    run(monkeypatch, "--minutes", "0.06", "--out", str(trained / "more"), "--work", str(trained / "work"))
    told = capsys.readouterr().out
    for name in ("vae", "unet"):
        assert f"{name}: goes on from step {steps[name]['steps']}" in told
    more = json.loads((trained / "more" / "provenance.json").read_text())["trained"]
    assert more["vae"]["steps"] > steps["vae"]["steps"]
    assert more["unet"]["steps"] > steps["unet"]["steps"]


def test_the_tokenizer_has_the_grammars_words_and_reads_any_text(trained: Path) -> None:
    tokenizer = image_parts.make_tokenizer(["a red circle on white", *(f"{c} {k}" for c in COLORS for k in KINDS)])
    assert tokenizer.tokenize("a Red circle on white") == ["a</w>", "red</w>", "circle</w>", "on</w>", "white</w>"]
    loaded: Any = StableDiffusionPipeline.from_pretrained(trained / "model").tokenizer
    for text in ("a red circle", "naïve café 😀", "{'x': [1, 2.5]}"):
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]
        assert loaded(text, padding="max_length").input_ids[0] == loaded.bos_token_id
        assert len(loaded(text, padding="max_length").input_ids) == image_parts.TEXT_LENGTH


def test_processes_draw_what_one_draws() -> None:
    chosen = list(itertools.islice(scenes(4), 6))
    assert torch.equal(train_images.drawn(chosen, 32, workers=3), train_images.drawn(chosen, 32, workers=1))


@pytest.mark.parametrize(("words", "says"), [(("--minutes", "0"), "--minutes"), (("--device", "cuda"), "no GPU")])
def test_what_cannot_be_done_is_said(
    words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train_images", *words])
    with pytest.raises(SystemExit):
        train_images.main()
    assert says in capsys.readouterr().err
