"""Text to image: this engine's UNet and VAE decoder against diffusers' own, in one process, on the same random weights.

`python -m miinb.bench.images` makes the shape of Stable Diffusion 1.5 and asks every arm for the same pictures, after a
warm-up, from the same noise and text embeddings: 512 x 512, 50 steps of PNDM, guidance 7.5, fp16. A text encoder has no
part in it (it takes as long as one step or two). The diffusers arms are its pipeline as published; `--compiled` adds
one with torch.compile and channels_last, which takes minutes. What an arm's latents differ by from those of diffusers
is told. `--profile` lists the kernels of a step, `--attention cudnn` has PyTorch prefer cuDNN's attention in all arms,
`--tiny` shows on any machine that everything runs. `--folder` writes the shape's configurations: a deployment with
`load_format="dummy"` of that folder serves it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig

from miinb.bench.environment import environment, hardware_words
from miinb.bench.records import Record, Runs, new_run_id, utc_now
from miinb.engine.diffusion_spec import unet_spec, vae_spec
from miinb.engine.image_blocks import can_pack, pack_convolutions
from miinb.engine.image_weights import tensors_of
from miinb.engine.unet import Unet
from miinb.engine.unet_graphs import GraphedUnet
from miinb.engine.unet_painter import decoded, denoised
from miinb.engine.unet_weights import unet_weights
from miinb.engine.vae import VaeDecoder, vae_weights

TOKENS = 77
_ATTENTION = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
_TINY_UNET: dict[str, Any] = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32, "norm_num_groups": 8}
_TINY_VAE: dict[str, Any] = {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4}
_SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "max_position_embeddings": TOKENS,
}
_TINY_TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 600}
_TINY_TEXT |= {"num_attention_heads": 4}


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked for: pictures of `size` pixels a side."""

    size: int = 512
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0


@dataclass(slots=True)
class Models:
    """diffusers' models, random, and where they are."""

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    dtype: str
    device: torch.device

    @classmethod
    def random(cls, *, tiny: bool, dtype: str, device: torch.device) -> Models:
        """Of the shape of Stable Diffusion 1.5, or tiny ones."""
        torch.manual_seed(0)
        with device:
            unet = UNet2DConditionModel(**_UNET | (_TINY_UNET if tiny else {}))
            vae = AutoencoderKL(**_VAE | (_TINY_VAE if tiny else {}))
        name = "tiny model" if tiny else "stable-diffusion-1.5 shape"
        return cls(name, unet.to(_DTYPES[dtype]).eval(), vae.to(_DTYPES[dtype]).eval(), dtype, device)

    def noise(self, batch: int, work: Work) -> tuple[Tensor, Tensor]:
        """[batch, 4, size / 8, size / 8] of noise and [2 * batch, 77, width] of text embeddings, the negative first."""
        generator = torch.Generator().manual_seed(work.seed)
        side, width = work.size // 8, self.unet.config.cross_attention_dim
        latents = torch.randn((batch, 4, side, side), generator=generator)
        text = torch.randn((2 * batch, TOKENS, width), generator=generator)
        return latents.to(self.device, _DTYPES[self.dtype]), text.to(self.device, _DTYPES[self.dtype])


def write_folder(folder: Path, *, tiny: bool = False) -> None:
    """The configurations of a pipeline of this shape, which `load_format="dummy"` serves with random weights."""
    with torch.device("meta"):
        UNet2DConditionModel(**_UNET | (_TINY_UNET if tiny else {})).save_config(folder / "unet")
        AutoencoderKL(**_VAE | (_TINY_VAE if tiny else {})).save_config(folder / "vae")
    CLIPTextConfig(**_TEXT | (_TINY_TEXT if tiny else {})).save_pretrained(folder / "text_encoder")
    PNDMScheduler(**_SCHEDULER).save_pretrained(folder / "scheduler")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


class Arm:
    """One side of the comparison."""

    name = ""
    engine = ""

    def warm(self, batch: int, work: Work) -> None:
        """What is done once for a size."""

    def denoise(self, noise: Tensor, text: Tensor, work: Work) -> Tensor:
        """Latents of noise."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents."""
        raise NotImplementedError


class Diffusers(Arm):
    """diffusers' pipeline as published, or compiled."""

    engine = "baseline"

    def __init__(self, models: Models, *, compiled: bool) -> None:
        self.name = "diffusers compiled" if compiled else "diffusers"
        self._vae = models.vae
        self._decode: Callable[..., Any] = models.vae.decode
        unet = models.unet
        if compiled:
            unet = torch.compile(unet.to(memory_format=torch.channels_last), mode="reduce-overhead")
            self._decode = torch.compile(models.vae.to(memory_format=torch.channels_last).decode)
        parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        scheduler = PNDMScheduler(**_SCHEDULER)
        self._pipeline = StableDiffusionPipeline(
            vae=models.vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts
        )
        self._pipeline.set_progress_bar_config(disable=True)

    def denoise(self, noise: Tensor, text: Tensor, work: Work) -> Tensor:
        """See `Arm`."""
        negative, positive = text.chunk(2)
        latents: Tensor = self._pipeline(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            latents=noise,
            num_inference_steps=work.steps,
            guidance_scale=work.guidance,
            output_type="latent",
        ).images
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """See `Arm`."""
        with torch.inference_mode():
            picture: Tensor = self._decode(latents / self._vae.config.scaling_factor, return_dict=False)[0]
        return picture


class Optimized(Arm):
    """This engine, with diffusers' scheduler."""

    name = engine = "optimized"

    def __init__(self, models: Models) -> None:
        dtype, device = _DTYPES[models.dtype], models.device
        shape = unet_spec(models.unet.config)
        unet = Unet(shape, unet_weights(shape, tensors_of(models.unet, dtype, device)))
        decoder = vae_spec(models.vae.config)
        self._vae = VaeDecoder(decoder, vae_weights(decoder, tensors_of(models.vae, dtype, device)))
        if device.type == "cpu" and can_pack():
            pack_convolutions([unet.weights, self._vae.weights])
        self._scale = models.vae.config.scaling_factor
        self._unet: Unet | GraphedUnet = GraphedUnet(unet) if device.type == "cuda" else unet

    def warm(self, batch: int, work: Work) -> None:
        """See `Arm`."""
        if isinstance(self._unet, GraphedUnet):
            self._unet.capture(batch, work.size // 8, work.size // 8, tokens=TOKENS, guided=True)

    def denoise(self, noise: Tensor, text: Tensor, work: Work) -> Tensor:
        """See `Arm`: the painter's own loop."""
        scheduler = PNDMScheduler(**_SCHEDULER)
        scheduler.set_timesteps(work.steps)
        return denoised(self._unet, scheduler, noise * scheduler.init_noise_sigma, text, work.guidance)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Arm`."""
        return decoded(self._vae, latents / self._scale)


def arms_of(models: Models, *, compiled: bool) -> Iterator[Arm]:
    """One after another: the compiled one changes the models' layout, so it comes last."""
    yield Diffusers(models, compiled=False)
    yield Optimized(models)
    if compiled:
        yield Diffusers(models, compiled=True)


def measure(models: Models, work: Work, *, batches: Sequence[int], repeat: int, compiled: bool) -> Runs:
    """Every arm at every batch, `repeat` times after a warm-up."""
    run_id, began, rows = new_run_id(), time.perf_counter(), list[Record]()
    env: dict[str, Any] = {"run_id": run_id, "name": "images", "created": utc_now(), "host": environment()}
    asked = {"size": work.size, "steps": work.steps, "guidance": work.guidance, "scheduler": "PNDM", "text": "embedded"}
    env |= {"model": models.name, "task": "text-to-image", "arms": {}, "workload": asked, "warnings": []}
    truth: dict[int, Tensor] = {}
    for arm in arms_of(models, compiled=compiled):
        facts = env["arms"].setdefault(arm.name, {"engine": arm.engine})
        for point, batch in enumerate(batches):
            noise, text = models.noise(batch, work)
            arm.warm(batch, work)
            for i in range(repeat + 1):
                record = _record(run_id, len(rows), arm, models, work, batch)
                record.point, record.warmup, record.t_rel_s = point, i == 0, time.perf_counter() - began
                latents, picture = _timed(arm, noise, text, work, record)
                rows.append(record)
            expected = truth.setdefault(batch, latents.float())
            facts[f"difference_{batch}"] = float((latents.float() - expected).norm() / expected.norm())
            facts[f"finite_{batch}"] = bool(picture.isfinite().all())
        del arm, latents, picture
        gc.collect()
    return Runs(({name: getattr(row, name) for name in Record.__slots__} for row in rows), {run_id: env})


def _record(run_id: str, seq: int, arm: Arm, models: Models, work: Work, batch: int) -> Record:
    record = Record(run_id, seq, arm.name, task="text-to-image", model=models.name)
    record.engine, record.dtype = arm.engine, models.dtype
    record.batch_size = record.concurrency = record.images = batch
    record.steps, record.guidance, record.seed = work.steps, work.guidance, work.seed
    record.width_px = record.height_px = work.size
    record.t_submit = utc_now()
    return record


def _timed(arm: Arm, noise: Tensor, text: Tensor, work: Work, record: Record) -> tuple[Tensor, Tensor]:
    """Latents and pictures of one batch; the times go into the record."""
    _wait(noise.device)
    began = time.perf_counter()
    latents = arm.denoise(noise, text, work)
    _wait(noise.device)
    denoised = time.perf_counter()
    picture = arm.decode(latents)
    _wait(noise.device)
    record.e2e_s = time.perf_counter() - began
    record.model_s, record.postprocess_s = denoised - began, record.e2e_s - (denoised - began)
    return latents, picture


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(runs: Runs) -> str:
    """Medians, a line an arm and batch."""
    (env,) = runs.env.values()
    rows = runs.requests[~runs.requests["warmup"]]
    lines = [
        f"{'arm':20} {'batch':>5} {'s/picture':>10} {'steps/s':>8} {'decode s':>9} {'speedup':>8} {'difference':>11}"
    ]
    first: dict[int, float] = {}
    for _, part in rows.groupby(["arm", "batch_size"], sort=False):
        arm, batch = part["arm"].iloc[0], int(part["batch_size"].iloc[0])
        whole, denoising, decoding = (float(part[name].median()) for name in ("e2e_s", "model_s", "postprocess_s"))
        ratio = first.setdefault(batch, whole) / whole
        facts = env["arms"][arm]
        unlike = "NOT FINITE" if not facts[f"finite_{batch}"] else f"{facts[f'difference_{batch}']:.1e}"
        lines.append(
            f"{arm:20} {batch:5d} {whole / batch:10.4f} {env['workload']['steps'] / denoising:8.1f} "
            f"{decoding:9.4f} {ratio:7.2f}x {unlike:>11}"
        )
    work = env["workload"]
    how = f"{work['size']} x {work['size']}, {work['steps']} steps, {rows['dtype'].iloc[0]}"
    lines.append(f"Medians of {len(rows) // (len(lines) - 1)}, {env['model']}, {how}; {hardware_words(env['host'])}.")
    return "\n".join(lines)


def profile(models: Models, work: Work, *, batch: int) -> str:
    """Where the time of a few steps and a decoding goes, without graphs, by kernel."""
    arm, few = Optimized(models), Work(work.size, 4, work.guidance, work.seed)
    noise, text = models.noise(batch, work)
    arm.decode(arm.denoise(noise, text, few))
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if models.device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as seen:
        arm.decode(arm.denoise(noise, text, few))
        _wait(models.device)
    order = "self_cuda_time_total" if models.device.type == "cuda" else "self_cpu_time_total"
    return str(seen.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90))


def _preferring(attention: str) -> AbstractContextManager[None]:
    """Within it PyTorch's attention is of this kind wherever it can be."""
    if attention == "auto":
        return nullcontext()
    others = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    order = list(dict.fromkeys((_ATTENTION[attention], *others)))
    return sdpa_kernel(order, set_priority=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and store the run if asked."""
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.images", description=__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp16" if gpu else "fp32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="pictures at a time (1 8)")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side (512)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--repeat", type=int, default=3, help="of each arm and batch (3)")
    parser.add_argument("--compiled", action="store_true", help="an arm with torch.compile as well: takes minutes")
    parser.add_argument("--attention", choices=["auto", *_ATTENTION], default="auto", help="what PyTorch prefers")
    parser.add_argument("--profile", action="store_true", help="list the optimized arm's kernels instead")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that everything runs")
    parser.add_argument("--out", type=Path, help="folder to append the run to (miinb.load_runs reads it)")
    parser.add_argument("--folder", type=Path, help='write the model\'s configurations for load_format="dummy" instead')
    options = parser.parse_args(arguments)
    if options.folder is not None:
        write_folder(options.folder, tiny=options.tiny)
        return
    if options.size < 64 or options.size % 8:
        parser.error(f"--size {options.size}: a multiple of 8 from 64 on")
    if min(*options.batches, options.steps, options.repeat) < 1:
        parser.error("--batches, --steps and --repeat count from 1")
    if options.guidance <= 1:
        parser.error(f"--guidance {options.guidance}: above 1, so that all arms compute two predictions a step")
    models = Models.random(tiny=options.tiny, dtype=options.dtype, device=torch.device(options.device))
    work = Work(options.size, options.steps, options.guidance)
    with _preferring(options.attention):
        if options.profile:
            print(profile(models, work, batch=options.batches[0]))
            return
        runs = measure(models, work, batches=options.batches, repeat=options.repeat, compiled=options.compiled)
    for env in runs.env.values():
        env["workload"]["attention"] = options.attention
    print(table(runs))
    if options.out is not None:
        runs.save(options.out)


if __name__ == "__main__":
    main()
