"""From a pipeline's folder to the optimized painter: weights, kernels, the parity check, graphs."""

from __future__ import annotations

import dataclasses
import time

import torch

from miinb.config import DeploymentConfig
from miinb.engine import image_parity
from miinb.engine.diffusion import ImageExecutor
from miinb.engine.diffusion_spec import DiffusionSpec
from miinb.engine.image_blocks import can_pack, pack_convolutions
from miinb.engine.image_weights import RandomTensors
from miinb.engine.pipeline_parts import check_parts, load_pipe, parts_of
from miinb.engine.place import Place
from miinb.engine.start_up import Aside, Report, compiled, verified, with_rounding
from miinb.engine.unet import Unet
from miinb.engine.unet_graphs import GraphedUnet, batches
from miinb.engine.unet_painter import UnetPainter
from miinb.engine.unet_weights import load_unet, unet_weights
from miinb.engine.vae import VaeDecoder, load_vae, vae_weights
from miinb.engine.weights import DTYPES, quantizers, weights_bytes
from miinb.errors import UnsupportedModel
from miinb.messages import EngineInfo, Phase, Plan
from miinb.models import ModelInfo
from miinb.pipelines import Pipeline
from miinb.wording import size_words


def load_painter(
    config: DeploymentConfig, model: ModelInfo, info: EngineInfo, place: Place, aside: Aside, report: Report
) -> ImageExecutor:
    """The executor of an image pipeline on this engine's UNet and VAE decoder.

    Args:
        config: the deployment's.
        model: with a pipeline.
        info: what the frontend is told; its plan gets lines on weights, operators, parity and graphs.
        place: the device and the dtype.
        aside: what goes on meanwhile.
        report: told of each phase.

    Raises:
        UnsupportedModel: there is no form for the pipeline, or the parity check failed.
        BrokenCheckpoint: weights are missing, damaged, NaN or infinite.
    """
    pipeline = model.pipeline
    if pipeline is None or pipeline.diffusion is None:
        raise model.unfused or UnsupportedModel(f"{model.source} is no image pipeline.")
    started = time.monotonic()
    report(Phase("load", 0, 3))
    unet, vae = _models(model, pipeline, pipeline.diffusion, place, report)
    pipe = load_pipe(model, pipeline, info, without=("unet",))
    pipe.vae.decoder = pipe.vae.post_quant_conv = None  # which this engine has itself
    report(Phase("load", 3, 3))
    parts = [list(part.parameters()) for part in parts_of(pipe).values()]
    size = weights_bytes([unet.weights, vae.weights, parts])
    plan = info.plan.with_line("load", size_words(size), f"in {time.monotonic() - started:.1f} s", weights_bytes=size)
    plan = with_rounding(plan, place.dtype, unet.weights.rounding, unet.weights.dtype, place.device)
    plan = _described(plan, pipeline)
    if place.device.type != "cuda":
        plan = plan.with_line("kernels", "PyTorch's", f"{_laid_out(unet, vae)}, {torch.get_num_threads()} threads")
    ranks = aside.ranks.result()
    if aside.kernels is not None:
        plan = plan.with_line("kernels", *compiled(aside.kernels, report))
    report(Phase("verify"))
    if config.options.parity != "off" and config.load_format != "dummy":
        check_parts(pipe, model)  # of its own weights each was looked at as it was read
    plan = verified(plan, lambda: image_parity.check(unet, vae), config, ranks)
    peak = torch.cuda.max_memory_allocated() if place.device.type == "cuda" else 0
    runner, plan = _capture(unet, pipeline, config, info, plan, report)
    painter = UnetPainter(pipe, pipeline, runner, vae, step_reuse=config.options.step_reuse)
    info = dataclasses.replace(info, plan=plan, load_peak_bytes=peak)
    return ImageExecutor(painter, info, max_queue=config.options.max_queue)


def _models(
    model: ModelInfo, pipeline: Pipeline, spec: DiffusionSpec, place: Place, report: Report
) -> tuple[Unet, VaeDecoder]:
    device = place.device
    name = pipeline.compute_dtype(place.dtype, on_gpu=device.type == "cuda")
    dtype, (quantizer, _) = DTYPES[name], quantizers(place.dtype, device)
    if model.format == "none":
        random = RandomTensors(dtype, device)
        unet = Unet(spec.unet, unet_weights(spec.unet, random, quantizer))
        return unet, VaeDecoder(spec.vae, vae_weights(spec.vae, random))
    half = pipeline.variant(name) == "fp16"
    unet = load_unet(model.folder / "unet", dtype=dtype, device=device, half=half, quantizer=quantizer)
    report(Phase("load", 1, 3))
    vae = load_vae(model.folder / "vae", dtype=dtype, device=device, half=half)
    report(Phase("load", 2, 3))
    return unet, vae


def _described(plan: Plan, pipeline: Pipeline) -> Plan:
    """The plan with lines on what computes."""
    why = "guidance shares what comes before the text; its keys and values and all time embeddings once a prompt"
    plan = plan.with_line("unet", "fused", why)
    plan = plan.with_line("vae", "fused", "the decoder; one picture at a time")
    checker = "kept" if pipeline.checks_safety else "none"
    return plan.with_line("diffusers", "text encoder, schedulers", f"as published; safety checker: {checker}")


def _laid_out(unet: Unet, vae: VaeDecoder) -> str:
    """Lay convolutions out for a CPU; how, in words."""
    if not can_pack(unet.weights.dtype):
        return f"oneDNN has no layout for convolutions of {unet.weights.dtype} here"
    pack_convolutions([unet.weights, vae.weights])
    return "convolutions in oneDNN's layout"


def _capture(
    unet: Unet, pipeline: Pipeline, config: DeploymentConfig, info: EngineInfo, plan: Plan, report: Report
) -> tuple[Unet | GraphedUnet, Plan]:
    """The UNet as CUDA graphs of the usual size, with guidance, and the plan's line on them.

    Each takes a second, most of it cuDNN's search for the fastest convolutions: what few ask for comes at first use.
    """
    if info.device != "cuda":
        return unet, plan
    if not config.options.cuda_graphs:
        return unet, plan.with_line("graphs", "off", "asked for")
    report(Phase("capture"))
    graphed = GraphedUnet(unet, reuse=config.options.step_reuse > 1)
    height, width = pipeline.height // pipeline.scale, pipeline.width // pipeline.scale
    for batch in batches(info.max_batch):
        graphed.capture(batch, height, width, tokens=pipeline.text_length, guided=True)
    return graphed, plan.with_line("graphs", "on", f"{graphed}; others at first use", graphs_bytes=graphed.bytes)
