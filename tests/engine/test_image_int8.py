"""A UNet with int8 weights: what the rounded weights compute, near the exact pictures, and as large as was planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from miinb import models, planner
from miinb.config import DeploymentConfig
from miinb.engine.diffusion import ImageExecutor
from miinb.engine.diffusion_spec import unet_spec
from miinb.engine.image_parameters import quantized_matrices
from miinb.engine.image_weights import RandomTensors
from miinb.engine.quantize import Quantizer
from miinb.engine.unet_graphs import GraphedUnet
from miinb.engine.unet_weights import load_unet, unet_weights
from miinb.engine.weights import tensors
from miinb.errors import InvalidValue, UnsupportedModel
from miinb.hardware import Hardware
from miinb.kernels.formats import dequantize
from miinb.kernels.linear import PackedLinear
from tests.engine import tiny_images
from tests.engine.image_rows import latents_of, picture, psnr, start, work
from tests.engine.test_unet import inputs
from tests.engine.tiny_images import distance, saved

CPU = torch.device("cpu")
FP32 = torch.float32


@pytest.fixture(scope="module")
def arms(
    pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ImageExecutor, ImageExecutor]]:
    """With int8 weights, and exact."""
    state = tmp_path_factory.mktemp("state")
    both = [start(pipeline_folder, state, dtype=dtype, max_batch=4)[0] for dtype in ("int8", "fp32")]
    yield both[0], both[1]
    for one in both:
        one.close()


def packed(value: Any) -> Iterator[PackedLinear]:
    """All linear layers of weights."""
    if isinstance(value, PackedLinear):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from packed(item)
    else:
        for name in getattr(value, "__dataclass_fields__", ()):
            yield from packed(getattr(value, name))


@pytest.mark.parametrize("words", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", ["sd1", "other"])
def test_a_step_is_that_of_the_rounded_weights(name: str, words: bool, tmp_path: Path) -> None:
    folder, quantizer = saved(tiny_images.unet(name), tmp_path), Quantizer(words=words)
    exact = load_unet(folder, dtype=FP32, device=CPU)
    rounded = load_unet(folder, dtype=FP32, device=CPU, quantizer=quantizer)
    latents, text = inputs(name, 2, (12, 10))
    times, index = torch.tensor([700, 20]), torch.tensor([1])
    ours, expected = (one.step(latents, index, one.prepare(text, times)) for one in (rounded, exact))
    for layer, whole in zip(packed(rounded.weights), packed(exact.weights), strict=True):
        if layer.scale is not None:
            wide = dequantize(layer.weight, layer.scale)[:, : whole.weight.shape[1]].float()
            assert 0 < distance(wide, whole.weight) < 0.01
            layer.weight, layer.scale = wide.contiguous(), None
    assert distance(ours, rounded.step(latents, index, rounded.prepare(text, times))) < 1e-5
    assert 1e-4 < distance(ours, expected) < 0.03
    assert rounded.weights.rounding == quantizer.rounding
    assert 0.002 < quantizer.rounding < 0.01
    assert exact.weights.rounding == 0


@pytest.mark.parametrize("name", ["sd1", "sd2", "other"])
def test_the_transformers_matrices_are_quantized_and_they_alone(name: str) -> None:
    spec = unet_spec(tiny_images.UNETS[name])
    weights = unet_weights(spec, RandomTensors(FP32, CPU), Quantizer())
    found = Counter(tuple(layer.weight.shape) for layer in packed(weights) if layer.scale is not None)
    expected = Counter(quantized_matrices(spec))
    text = [shape for shape in expected.elements() if shape[1] == spec.text_width]
    expected -= Counter(text)
    expected[sum(rows for rows, _ in text), spec.text_width] += 1  # of all layers in one
    assert found == expected
    assert all(tensor.dtype == FP32 for tensor in tensors([weights.conv_in, weights.time1, weights.time2]))
    assert all(tensor.dtype != torch.int8 for block in weights.down for tensor in tensors(block.resnets))


def test_the_plan_says_what_was_lost(arms: tuple[ImageExecutor, ImageExecutor]) -> None:
    info = arms[0].info
    lines = {line.what: line for line in info.plan.lines}
    assert info.dtype == "int8"
    assert (info.engine, lines["parity"].choice) == ("optimized", "passed")
    assert lines["int8"].reason == "change of the weights by rounding (root mean square)"
    assert 0.2 < float(lines["int8"].choice.rstrip("%")) < 1
    assert "int8" not in {line.what for line in arms[1].info.plan.lines}


def test_weights_are_as_large_as_planned(pipeline_folder: Path, arms: tuple[ImageExecutor, ImageExecutor]) -> None:
    """But for what is computed ahead of them: sums of doubled convolutions, and the encoder's layer before latents."""
    info, machine = models.inspect(pipeline_folder), Hardware("CPU", 4, 8 << 30, 8 << 30, gpus=())
    sizes = []
    for arm, dtype in zip(arms, ("int8", "fp32"), strict=True):
        config = DeploymentConfig.parse({"model": str(pipeline_folder), "device": "cpu", "dtype": dtype})
        sizes.append((planner.plan(config, info, machine).weights_bytes, arm.info.plan.weights_bytes))
    planned, there = (one[1] - one[0] for one in zip(*sizes, strict=True))
    assert planned == pytest.approx(there, rel=0.01)
    assert sizes[0][0] < 0.9 * sizes[1][0]


def test_pictures_are_near(arms: tuple[ImageExecutor, ImageExecutor]) -> None:
    """Of 20 steps of PNDM: 62 dB were measured."""
    ours, exact = (picture(arm, num_inference_steps=20) for arm in arms)
    assert 50 < psnr(ours, exact) < 80


def test_a_batch_gives_what_each_gives_alone(arms: tuple[ImageExecutor, ImageExecutor]) -> None:
    prompts = ["a red cat", "the blue fox"]
    together = latents_of(arms[0], work(), [3, 4], *prompts)
    for place, prompt in enumerate(prompts):
        assert distance(together[place : place + 1], latents_of(arms[0], work(), [3 + place], prompt)) < 1e-4


def test_random_weights_and_reused_steps_go_with_it(pipeline_folder: Path, tmp_path: Path) -> None:
    executor, _ = start(
        pipeline_folder, tmp_path, dtype="int8", load_format="dummy", options={"threads": 1, "step_reuse": 2}
    )
    assert picture(executor).std() > 0
    assert any(line.what == "int8" for line in executor.info.plan.lines)


def test_what_falls_back_to_diffusers_is_refused(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miinb.engine import image_loading

    def fail(*args: Any) -> None:
        raise UnsupportedModel("The fused layers differ.")

    monkeypatch.setattr(image_loading, "verified", fail)
    with pytest.raises(InvalidValue, match="dtype: int8 needs the optimized engine: The fused layers differ"):
        start(pipeline_folder, tmp_path / "state", dtype="int8")


def test_its_kernels_are_known_ahead(pipeline_folder: Path) -> None:
    pytest.importorskip("triton")
    from miinb.engine.compile import kernels_of
    from miinb.engine.recording import compiling_for

    names = {}
    for dtype in ("fp16", "int8"):
        config = DeploymentConfig.parse({"model": str(pipeline_folder), "dtype": dtype, "max_batch": 2})
        with compiling_for((9, 0)):
            names[dtype] = {kernel.name for kernel in kernels_of(config, models.inspect(pipeline_folder))}
    assert names["int8"] - names["fp16"]
    assert names["int8"] >= {"_whole_groups", "_join", "_norm"}


@pytest.mark.gpu
def test_a_gpu_predicts_what_a_cpu_does(tmp_path: Path) -> None:
    folder = saved(tiny_images.unet("sd1"), tmp_path)
    exact = load_unet(folder, dtype=FP32, device=CPU, quantizer=Quantizer(words=True))
    latents, text = inputs("sd1", 2, (16, 24), tokens=77)
    times, index = torch.tensor([700, 20]), torch.tensor([1])
    expected = exact.step(latents, index, exact.prepare(text, times))
    for dtype, limit in ((FP32, 3e-3), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)):
        unet = load_unet(folder, dtype=dtype, device=torch.device("cuda"), quantizer=Quantizer(words=True))
        graphed = GraphedUnet(unet)
        conditions = graphed.prepare(text.cuda(), times)
        eager = graphed.step(latents.cuda(), index.cuda(), conditions).clone()
        assert graphed.capture(2, 16, 24)
        replayed = graphed.step(latents.cuda(), index.cuda(), conditions)
        assert all(distance(out.cpu(), expected) < limit for out in (eager, replayed))
