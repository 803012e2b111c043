"""Text to image: this engine against diffusers, on the same random weights, in one process and behind the server.

`python -m miinb.bench.images` makes the shape of Stable Diffusion 1.5 and asks every arm for the same pictures, after a
warm-up, from the same noise and text embeddings: 512 x 512, 50 steps of PNDM, guidance 7.5, fp16, one picture and eight
at a time. A text encoder has no part in it (it takes as long as one step or two). The baseline is diffusers' pipeline
as published; `--compiled` adds one with torch.compile and channels_last, which takes minutes. How far an arm's latents
and pictures are from diffusers' is told. `--served` writes the weights to a folder, starts both engines on it, tells
the phases of their starts, and compares them through the server, whose share of the time is told. `--quick` measures
less often. `--lossy step_reuse=3 int8` adds an arm for each; in process their pictures are compared with the optimized
arm's, which is exact. `--profile` lists the kernels of a step, `--attention cudnn` has PyTorch prefer cuDNN's attention
in process, `--tiny` shows on any machine that everything runs. `--out` keeps records and charts.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from miinb.bench import image_folder, image_sessions, image_tables
from miinb.bench.environment import environment
from miinb.bench.image_arms import DTYPES, EXACT, LABELS, Arm, Lossy, Models, Optimized, Work, arms_of
from miinb.bench.image_measures import note_differences
from miinb.bench.pixels import Pixels
from miinb.bench.records import Record, Runs, new_run_id, utc_now
from miinb.bench.thumbnails import MOST, entry

_ATTENTION = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def measure(
    models: Models,
    work: Work,
    *,
    batches: Sequence[int],
    repeat: int,
    compiled: bool,
    lossy: Sequence[Lossy] = (),
) -> Runs:
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
    truth: dict[tuple[bool, int], tuple[Tensor, list[Pixels]]] = {}
    inexact = {one.name for one in lossy}
    for arm in arms_of(models, lossy=lossy, compiled=compiled):
        label = LABELS.get(arm.name, arm.name)
        on_gpu = int(models.device.type == "cuda")
        facts = env["arms"].setdefault(label, {"engine": arm.engine, "model": models.name, "n_gpus": on_gpu})
        if label in inexact:
            facts["compared_with"] = EXACT
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
            if label == EXACT:
                truth[True, batch] = latents.float(), made
            expected, pictures = truth.setdefault((label in inexact, batch), (latents.float(), made))
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
    record.engine, record.dtype, record.concurrency = arm.engine, arm.dtype, 1
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
    """All arms but compiled ones behind their servers, on a folder with these weights; the models are let go."""
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        name = Path(place) / models.name.replace(" ", "-")
        folder = image_folder.write(name, models.unet, models.vae, tiny=options.tiny)
        models.release()
        asked = {"num_inference_steps": work.steps, "guidance_scale": work.guidance, "seed": work.seed}
        asked |= {"height": work.size, "width": work.size}
        usual = {"dtype": options.dtype}
        arms: dict[str, Any] = {engine: {"engine": engine, **usual} for engine in ("baseline", EXACT)}
        arms |= {one.name: {"engine": EXACT, **usual, **one.fields} for one in options.lossy}
        return image_sessions.measure(
            folder,
            arms,
            device=options.device,
            batches=options.batches,
            requests=options.requests,
            asked=asked,
        )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.images", description=__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16" if gpu else "fp32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="pictures at a time (1 8)")
    parser.add_argument("--size", type=int, help="pixels of a side (512; of --tiny 64)")
    parser.add_argument("--steps", type=int, help="(50; of --tiny 4)")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--repeat", type=int, help="in process, of each arm and batch (4; of --quick 3)")
    parser.add_argument("--requests", type=int, help="served, of each arm and batch (10; of --quick 3)")
    parser.add_argument("--compiled", action="store_true", help="an arm with torch.compile as well: takes minutes")
    parser.add_argument(
        "--lossy", type=_lossy, nargs="+", default=[], metavar="HOW", help="arms: step_reuse=N (2 to 10), int8"
    )
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
    if options.profile and (options.served or options.lossy):
        parser.error("--profile lists kernels of the exact engine instead of measuring: leave --served and --lossy out")
    if len({one.name for one in options.lossy}) < len(options.lossy):
        parser.error("--lossy: each once")
    return options


def _lossy(text: str) -> Lossy:
    try:
        return Lossy.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and store the runs and their charts if asked."""
    options = parsed(arguments)
    models = Models.random(tiny=options.tiny, dtype=options.dtype, device=torch.device(options.device))
    work = Work(options.size, options.steps, options.guidance)
    with _preferring(options.attention):
        if options.profile:
            print(profile(models, work, batch=options.batches[0]))
            return
        asked = {"batches": options.batches, "repeat": options.repeat, "compiled": options.compiled}
        runs = measure(models, work, **asked, lossy=options.lossy)
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
