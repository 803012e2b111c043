"""Text to image: this engine against diffusers, on the same random weights, in one process and behind the server.

`python -m miinb.bench.images` makes the shape of Stable Diffusion 1.5 and asks every arm for the same pictures, after a
warm-up, from the same noise and text embeddings: 512 x 512, 50 steps of PNDM, guidance 7.5, fp16, one picture and eight
at a time. A text encoder has no part in it (it takes as long as one step or two). The baseline is diffusers' pipeline
as published; `--compiled` adds one with torch.compile and channels_last, which takes minutes. How far an arm's latents
and pictures are from diffusers' is told. `--served` writes the weights to a folder, starts both engines on it, tells
the phases of their starts, and compares them through the server, whose share of the time is told. `--quick` measures
less often, `--profile` lists the kernels of a step, `--attention cudnn` has PyTorch prefer cuDNN's attention in
process, `--tiny` shows on any machine that everything runs. `--out` keeps records and charts.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
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

from miinb.bench import image_folder, image_sessions, image_tables
from miinb.bench.environment import environment
from miinb.bench.image_measures import note_differences
from miinb.bench.pixels import Pixels
from miinb.bench.records import Record, Runs, new_run_id, utc_now
from miinb.bench.thumbnails import MOST, entry
from miinb.engine.diffusion_spec import unet_spec, vae_spec
from miinb.engine.image_blocks import can_pack, pack_convolutions
from miinb.engine.image_weights import tensors_of
from miinb.engine.unet import Unet
from miinb.engine.unet_graphs import GraphedUnet
from miinb.engine.unet_painter import decoded, denoised
from miinb.engine.unet_weights import unet_weights
from miinb.engine.vae import VaeDecoder, vae_weights

TOKENS = image_folder.TOKENS
#: What the arms are called in records and charts.
LABELS = {"diffusers": "baseline", "diffusers compiled": "baseline-best"}
_ATTENTION = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


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
            unet = UNet2DConditionModel(**image_folder.unet_config(tiny=tiny))
            vae = AutoencoderKL(**image_folder.vae_config(tiny=tiny))
        name = "tiny model" if tiny else "stable-diffusion-1.5 shape"
        return cls(name, unet.to(_DTYPES[dtype]).eval(), vae.to(_DTYPES[dtype]).eval(), dtype, device)

    def release(self) -> None:
        """Let the device's memory go: the models are not used any more."""
        del self.unet, self.vae
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def noise(self, batch: int, work: Work) -> tuple[Tensor, Tensor]:
        """[batch, 4, size / 8, size / 8] of noise and [2 * batch, 77, width] of text embeddings, the negative first."""
        generator = torch.Generator().manual_seed(work.seed)
        side, width = work.size // 8, self.unet.config.cross_attention_dim
        latents = torch.randn((batch, 4, side, side), generator=generator)
        text = torch.randn((2 * batch, TOKENS, width), generator=generator)
        return latents.to(self.device, _DTYPES[self.dtype]), text.to(self.device, _DTYPES[self.dtype])


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
        scheduler = PNDMScheduler(**image_folder.SCHEDULER)
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
        scheduler = PNDMScheduler(**image_folder.SCHEDULER)
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
    env |= {
        "model": models.name,
        "task": "text-to-image",
        "arms": {},
        "workload": asked,
        "warnings": [],
        "pictures": [],
    }
    truth: dict[int, tuple[Tensor, list[Pixels]]] = {}
    for arm in arms_of(models, compiled=compiled):
        label = LABELS.get(arm.name, arm.name)
        on_gpu = int(models.device.type == "cuda")
        facts = env["arms"].setdefault(label, {"engine": arm.engine, "model": models.name, "n_gpus": on_gpu})
        for point, batch in enumerate(batches):
            noise, text = models.noise(batch, work)
            warming = time.perf_counter()
            arm.warm(batch, work)
            facts[f"warm_{batch}_s"] = time.perf_counter() - warming
            for i in range(repeat + 1):
                record = _record(run_id, len(rows), label, arm, models, work, batch)
                record.point, record.warmup, record.t_rel_s = point, i == 0, time.perf_counter() - began
                latents, picture = _timed(arm, noise, text, work, record)
                rows.append(record)
            made = _pixels(picture)
            expected, pictures = truth.setdefault(batch, (latents.float(), made))
            for record in rows[-repeat:] if pictures is not made else ():
                record.equal = note_differences(record, pictures, made)
            facts[f"difference_{batch}"] = float((latents.float() - expected).norm() / expected.norm())
            facts[f"finite_{batch}"] = bool(picture.isfinite().all())
            if batch == max(batches):
                env["pictures"] += [entry(label, one, prompt=f"noise {i}") for i, one in enumerate(made[:MOST])]
        del arm, latents, picture
        gc.collect()
    return Runs(({name: getattr(row, name) for name in Record.__slots__} for row in rows), {run_id: env})


def _record(run_id: str, seq: int, label: str, arm: Arm, models: Models, work: Work, batch: int) -> Record:
    record = Record(run_id, seq, label, task="text-to-image", model=models.name)
    record.engine, record.dtype, record.concurrency = arm.engine, models.dtype, 1
    record.batch_size = record.images = batch
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
    record.e2e_s = record.model_s = time.perf_counter() - began
    record.steps_s, record.vae_s = denoised - began, record.e2e_s - (denoised - began)
    record.step_s, record.image_s = record.steps_s / work.steps, record.e2e_s / record.images
    return latents, picture


def _pixels(picture: Tensor) -> list[Pixels]:
    """Decoded pictures as diffusers rounds them."""
    values = ((picture.detach().float() / 2 + 0.5).nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return list(values.permute(0, 2, 3, 1).cpu().numpy())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def served(models: Models, work: Work, options: argparse.Namespace) -> Runs:
    """Both engines behind their servers, on a folder with these weights; the models are let go."""
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        name = Path(place) / models.name.replace(" ", "-")
        folder = image_folder.write(name, models.unet, models.vae, tiny=options.tiny)
        models.release()
        asked = {"num_inference_steps": work.steps, "guidance_scale": work.guidance, "seed": work.seed}
        asked |= {"height": work.size, "width": work.size}
        return image_sessions.measure(
            folder,
            device=options.device,
            dtype=options.dtype,
            batches=options.batches,
            requests=options.requests,
            asked=asked,
        )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.images", description=__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp16" if gpu else "fp32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="pictures at a time (1 8)")
    parser.add_argument("--size", type=int, help="pixels of a side (512; of --tiny 64)")
    parser.add_argument("--steps", type=int, help="(50; of --tiny 4)")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--repeat", type=int, help="in process, of each arm and batch (4; of --quick 3)")
    parser.add_argument("--requests", type=int, help="served, of each arm and batch (10; of --quick 3)")
    parser.add_argument("--compiled", action="store_true", help="an arm with torch.compile as well: takes minutes")
    parser.add_argument("--served", action="store_true", help="through the server as well: starts, and its share")
    parser.add_argument("--quick", action="store_true", help="measure less often: a few minutes on a fast GPU")
    parser.add_argument("--attention", choices=["auto", *_ATTENTION], default="auto", help="what PyTorch prefers")
    parser.add_argument("--profile", action="store_true", help="list the optimized arm's kernels instead")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that everything runs")
    parser.add_argument("--folder", type=Path, help="where --served puts its weights (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help="folder to append the runs to (miinb.load_runs reads it), with charts")
    options = parser.parse_args(arguments)
    usual = {"size": 64 if options.tiny else 512, "steps": 4 if options.tiny else 50}
    usual |= {"repeat": 3, "requests": 3} if options.quick else {"repeat": 4, "requests": 10}
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.size < 64 or options.size % 8:
        parser.error(f"--size {options.size}: a multiple of 8 from 64 on")
    if min(*options.batches, options.steps, options.repeat, options.requests) < 1:
        parser.error("--batches, --steps, --repeat and --requests count from 1")
    if options.guidance <= 1:
        parser.error(f"--guidance {options.guidance}: above 1, so that all arms compute two predictions a step")
    if options.profile and options.served:
        parser.error("--profile lists kernels instead of measuring: leave --served out")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and store the runs and their charts if asked."""
    options = parsed(arguments)
    models = Models.random(tiny=options.tiny, dtype=options.dtype, device=torch.device(options.device))
    work = Work(options.size, options.steps, options.guidance)
    with _preferring(options.attention):
        if options.profile:
            print(profile(models, work, batch=options.batches[0]))
            return
        runs = measure(models, work, batches=options.batches, repeat=options.repeat, compiled=options.compiled)
    for env in runs.env.values():
        env["workload"]["attention"] = options.attention
    print(image_tables.in_process(runs), flush=True)
    _keep(runs, options.out, "in-process")
    if options.served:
        through = served(models, work, options)
        print(f"\n{through}\n\n{image_tables.served(through)}", flush=True)
        _keep(through, options.out, "served")


def _keep(runs: Runs, folder: Path | None, name: str) -> None:
    if folder is not None:
        runs.save(folder)
        image_tables.draw(runs, folder, name)


if __name__ == "__main__":
    main()
