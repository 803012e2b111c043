"""Image pipelines before anything starts: what a folder holds, and what is planned for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from miinb import models, planner
from miinb.config import DeploymentConfig
from miinb.engine.diffusion_spec import unet_spec, vae_spec
from miinb.engine.image_parameters import count_unet, count_vae, quantized_matrices
from miinb.errors import BrokenCheckpoint, InvalidRequest, InvalidValue, OutOfMemory, UnsupportedModel
from miinb.hardware import Gpu, Hardware
from miinb.image_params import ImageParams, parse_images
from miinb.messages import Plan
from tests.engine import tiny_images
from tests.tiny_pipeline import SIZE, TEXT_LENGTH, make_pipeline


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("pipeline")
    return folder / "model", make_pipeline(folder)


@pytest.fixture
def folder(made: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    shutil.copytree(made[0], tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def gpu(capability: tuple[int, int] = (9, 0), *, index: int = 0, free: int = 20 << 30) -> Gpu:
    return Gpu(index, index, "H200", free, free, capability)


def plan(folder: Path, *, gpus: tuple[Gpu, ...] = (), free: int = 8 << 30, **config: Any) -> Plan:
    machine = Hardware("CPU", 4, free, free, gpus=gpus)
    settings = DeploymentConfig.parse({"model": str(folder), **config})
    return planner.plan(settings, models.inspect(folder), machine)


def test_what_a_folder_holds(made: tuple[Path, Any]) -> None:
    folder, pipe = made
    info = models.inspect(folder)
    assert (info.tasks, info.task(), info.dtype) == (("text-to-image",), "text-to-image", "fp32")
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert info.parameters == sum(tensor.numel() for part in parts for tensor in part.state_dict().values())
    assert "unet/conv_in.weight" in info.tensors
    found = info.pipeline
    assert found is not None
    assert (found.width, found.height, found.scale, found.text_length) == (SIZE, SIZE, 2, TEXT_LENGTH)
    assert (found.scheduler, found.checks_safety, found.variant("fp16")) == ("PNDMScheduler", False, None)


def test_inspecting_never_imports_torch(made: tuple[Path, Any]) -> None:
    code = f"import miinb.models as m, sys; m.inspect({str(made[0])!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_files_of_half_the_size_are_told_apart(made: tuple[Path, Any], tmp_path: Path) -> None:
    pipe = make_pipeline(tmp_path / "made")
    pipe.to(torch.float16).save_pretrained(tmp_path / "half", safe_serialization=True, variant="fp16")
    only = models.inspect(tmp_path / "half")
    assert only.dtype == "fp16"
    assert only.pipeline is not None
    assert [only.pipeline.variant(dtype) for dtype in ("fp16", "fp32")] == ["fp16", "fp16"]
    shutil.copytree(made[0], tmp_path / "half", dirs_exist_ok=True)
    both = models.inspect(tmp_path / "half")
    assert (both.dtype, both.parameters) == ("fp32", only.parameters)
    assert both.pipeline is not None
    assert [both.pipeline.variant(dtype) for dtype in ("fp16", "fp32")] == ["fp16", None]
    assert plan(tmp_path / "half", gpus=(gpu(),)).dtype == "fp16"


def test_other_pipelines_code_and_pickles_are_refused(folder: Path) -> None:
    index = folder / "model_index.json"
    for other in ("StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionXLImg2ImgPipeline", None):
        edit(index, _class_name=other)
        with pytest.raises(UnsupportedModel, match=f"is a {other}, which is not served") as refused:
            models.inspect(folder)
        assert "StableDiffusionXLPipeline" in refused.value.hint
    edit(index, _class_name="StableDiffusionXLPipeline")
    with pytest.raises(BrokenCheckpoint, match="text_encoder_2"):
        models.inspect(folder)
    edit(index, _class_name="StableDiffusionPipeline", unet=["my_unet", "MyUnet"])
    with pytest.raises(UnsupportedModel, match="its own Python code"):
        models.inspect(folder)
    edit(index, unet=["diffusers", "UNet2DConditionModel"], image_encoder=["transformers", "X"])
    with pytest.raises(UnsupportedModel, match="image encoder"):
        models.inspect(folder)
    edit(index, image_encoder=[None, None])
    weights = next((folder / "vae").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UnsupportedModel, match="pickle"):
        models.inspect(folder)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("model_index.json", "{", "model_index.json"),
        ("model_index.json", "[]", "no object"),
        ("vae/config.json", None, "vae/config.json is missing"),
        ("unet/config.json", '{"sample_size": "x"}', "cannot be used"),
        ("text_encoder/config.json", "{}", "max_position_embeddings"),
        ("unet/diffusion_pytorch_model.safetensors", "junk", "damaged"),
        ("unet/diffusion_pytorch_model.safetensors", None, "no weights"),
    ],
)
def test_damage_is_named(folder: Path, file: str, text: str | None, words: str) -> None:
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(BrokenCheckpoint, match=words):
        models.inspect(folder)


def test_parts_that_are_missing_are_named(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(BrokenCheckpoint, match="tokenizer"):
        models.inspect(folder)
    edit(folder / "model_index.json", scheduler=[None, None])
    with pytest.raises(BrokenCheckpoint, match="scheduler"):
        models.inspect(folder)


def test_the_plan_says_what_runs_and_why(made: tuple[Path, Any]) -> None:
    found = plan(made[0], device="cpu")
    assert (found.engine, found.dtype, found.max_length, found.max_batch) == ("optimized", "fp32", TEXT_LENGTH, 2)
    assert not found.warnings
    baseline = plan(made[0], device="cpu", engine="baseline")
    assert (baseline.engine, baseline.warnings) == ("baseline", ())
    assert f"{SIZE} x {SIZE}" in str(found)
    assert plan(made[0], device="cpu", dtype="fp16").dtype == "fp32"
    assert plan(made[0], device="cpu", dtype="bf16").dtype == "bf16"
    assert plan(made[0], gpus=(gpu(),)).dtype == "fp32"  # the files have no fp16
    assert plan(made[0], gpus=(gpu(),), dtype="fp16").max_batch == 8
    with pytest.raises(InvalidValue, match="bf16"):
        plan(made[0], gpus=(gpu((7, 5)),), dtype="bf16")


@pytest.mark.parametrize(
    "config",
    [
        {"tensor_parallel": 2},
        {"max_length": 100},
        {"kv_dtype": "fp8"},
        {"dtype": "int4"},
        {"dtype": "fp8"},
        {"engine": "baseline", "options": {"compile": True}},
        {"options": {"offload": "cpu"}},
        {"options": {"speculative": "prompt_lookup"}},
        {"options": {"calibration": ["Some text."]}},
        {"dtype": "int8", "options": {"quantize_head": False}},
    ],
    ids=lambda config: next(reversed(config)),
)
def test_options_that_would_do_nothing_are_refused(made: tuple[Path, Any], config: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="text-to-image"):
        plan(made[0], gpus=(gpu(), gpu(index=1)), **config)


def test_int8_is_planned_where_that_can_be(made: tuple[Path, Any], folder: Path) -> None:
    on_cpu = plan(made[0], device="cpu", dtype="int8")
    (line,) = (line for line in on_cpu.lines if line.what == "dtype")
    assert (on_cpu.dtype, on_cpu.max_batch, on_cpu.warnings) == ("int8", 2, ())
    assert line.reason.startswith("asked for, lossy: ")
    assert "are in fp32; on a CPU that saves memory, not time" in line.reason
    on_gpu = plan(made[0], gpus=(gpu(),), dtype="int8")
    assert "are in bf16" in next(line.reason for line in on_gpu.lines if line.what == "dtype")
    info = models.inspect(made[0])
    assert info.pipeline is not None
    assert info.pipeline.diffusion is not None
    matrices = quantized_matrices(info.pipeline.diffusion.unet)
    count = sum(rows * columns for rows, columns in matrices)
    scales = sum(rows * -(-columns // 64) for rows, columns in matrices)
    assert on_cpu.weights_bytes == 4 * (info.parameters - count) + count + 4 * scales
    assert on_gpu.weights_bytes == 2 * (info.parameters - count) + count + 2 * scales  # all rows are multiples of 16
    with pytest.raises(InvalidValue, match="int8 needs an Ampere GPU"):
        plan(made[0], gpus=(gpu((7, 5)),), dtype="int8")
    with pytest.raises(InvalidValue, match="int8 needs the optimized engine, and plain diffusers serve this"):
        plan(made[0], device="cpu", dtype="int8", engine="baseline")
    edit(folder / "unet" / "config.json", resnet_time_scale_shift="scale_shift")
    with pytest.raises(InvalidValue, match="int8 needs the optimized engine"):
        plan(folder, device="cpu", dtype="int8")


def test_steps_are_reused_where_that_can_be(made: tuple[Path, Any], folder: Path) -> None:
    asked: dict[str, Any] = {"device": "cpu", "options": {"step_reuse": 3}}
    found = plan(made[0], **asked)
    (line,) = (line for line in found.lines if line.what == "step_reuse")
    assert line.choice == "3"
    assert line.reason.startswith("lossy: ")
    assert not found.warnings
    assert not any(line.what == "step_reuse" for line in plan(made[0], device="cpu").lines)
    with pytest.raises(InvalidValue, match=r"options\.step_reuse: only for engine='optimized'"):
        plan(made[0], engine="baseline", **asked)
    for wrong in (0, 11, 2.5):
        with pytest.raises(InvalidValue, match="step_reuse"):
            plan(made[0], options={"step_reuse": wrong})
    edit(folder / "unet" / "config.json", resnet_time_scale_shift="scale_shift")
    with pytest.raises(InvalidValue, match=r"options\.step_reuse: only the optimized engine .*scale_shift"):
        plan(folder, **asked)


def test_what_has_no_form_runs_on_diffusers_and_says_why(folder: Path) -> None:
    edit(folder / "unet" / "config.json", resnet_time_scale_shift="scale_shift")
    found = plan(folder, device="cpu")
    assert found.engine == "baseline"
    assert "resnet_time_scale_shift" in found.warnings[0]
    edit(folder / "unet" / "config.json", resnet_time_scale_shift="default", in_channels=9)
    assert "9 channels" in plan(folder, device="cpu").warnings[0]
    with pytest.raises(UnsupportedModel, match="9 channels"):
        models.inspect(folder, load_format="dummy")


def test_parameters_are_counted_without_files(made: tuple[Path, Any], folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    dummy = models.inspect(folder, load_format="dummy")
    assert dummy.parameters == models.inspect(made[0]).parameters
    machine = Hardware("CPU", 4, 8 << 30, 8 << 30)
    config = DeploymentConfig.parse({"model": str(folder), "device": "cpu", "load_format": "dummy"})
    assert planner.plan(config, dummy, machine).engine == "optimized"


@pytest.mark.parametrize("kind", ["sd1", "sd2", "other"])
def test_unets_and_vaes_of_all_shapes_are_counted(kind: str) -> None:
    unet = tiny_images.unet(kind)
    assert count_unet(unet_spec(unet.config)) == sum(tensor.numel() for tensor in unet.parameters())
    for name in tiny_images.VAES:
        vae = tiny_images.vae(name)
        assert count_vae(vae_spec(vae.config)) == sum(tensor.numel() for tensor in vae.parameters())


def test_what_does_not_fit_is_refused_with_what_would(made: tuple[Path, Any]) -> None:
    with pytest.raises(OutOfMemory, match=r"4\.74 MB of weights"):
        plan(made[0], device="cpu", free=600 << 20)
    with pytest.raises(OutOfMemory, match="500 pictures") as refused:
        plan(made[0], device="cpu", free=1 << 30, max_batch=500)
    assert "max_batch=" in refused.value.hint
    with pytest.raises(UnsupportedModel, match="does not serve text-generation"):
        plan(made[0], device="cpu", task="text-generation")


def test_a_resolved_configuration_is_planned_alike(made: tuple[Path, Any]) -> None:
    """As `restart` of a joined deployment does."""
    machine = Hardware("CPU", 4, 8 << 30, 8 << 30)
    config = DeploymentConfig.parse({"model": str(made[0]), "device": "cpu"})
    info = models.inspect(made[0])
    first = planner.plan(config, info, machine)
    again = planner.plan(planner.resolve(config, first, machine), info, machine)
    assert (again.dtype, again.max_batch, again.max_length) == (first.dtype, first.max_batch, first.max_length)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"height": 60}, "56 and 64"),
        ({"width": 2056}, "width"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": True}, "guidance_scale"),
        ({"negative_prompt": 3}, "negative_prompt"),
        ({"negative_prompt": "x", "guidance_scale": 1.0}, "guidance_scale above 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"seed": -1}, "seed"),
        ({"steps": 3}, "num_inference_steps"),
        ({"generator": None}, "seed="),
        ({"negative_promt": "x"}, "negative_prompt"),
    ],
)
def test_wrong_parameters_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_images(values)
    assert words in f"{refused.value.message} {refused.value.hint}"
    assert parse_images({"height": None, "guidance_scale": 3}) == ImageParams(guidance_scale=3.0)
