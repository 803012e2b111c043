"""Trains the tiny image model that ships inside the package: `python -m miinb.demo.train_images`, minutes on one GPU.

The folder that it writes is an ordinary one of diffusers: a `StableDiffusionPipeline`. Pictures and captions come from
`shapes.py`, so the model is the project's own work, free of other licenses. What it makes of 12 prompts is measured by
`judging.py`. A run that was ended goes on from its last checkpoint in `--work`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn

from miinb.demo import IMAGES, image_parts
from miinb.demo.image_parts import SIZES, Sizes
from miinb.demo.judging import GUIDANCE, SEEDS, STEPS, Seen, is_right, judge
from miinb.demo.shapes import Scene, draw, prompts, scenes
from miinb.engine.previews import STABLE_DIFFUSION

#: Weights in the VAE's loss: of the distance from a normal distribution, and of the previews' error.
_KL, _PREVIEW = 3e-4, 0.1
#: How much more a pixel counts in it that is all color and no gray: most of a picture is background.
_COLORED = 3.0
#: Share of captions that are left out, for the prediction without a prompt.
_UNCONDITIONAL = 0.1
_SAVE_EVERY_S = 60.0
#: The parts of the pipeline that have weights.
_COUNTED = ("unet", "vae", "text_encoder")


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """One training, as long as its time lasts.

    Attributes:
        name: of its checkpoint.
        parts: what is trained.
        loss: of a batch that it draws itself.
        seconds: of the training, earlier ones of the same checkpoint included.
        rate: peak learning rate.
        work: folder of checkpoints.
    """

    name: str
    parts: nn.Module
    loss: Callable[[], Tensor]
    seconds: float
    rate: float
    work: Path

    def train(self) -> dict[str, Any]:
        """AdamW with warm-up and cosine decay by the time; the parts end as the moving average of their weights.

        Returns:
            Steps, seconds, and the mean loss of the last 100 steps.
        """
        parameters = list(self.parts.parameters())
        average = EMAModel(parameters, decay=0.998, foreach=True)
        optimizer = torch.optim.AdamW(parameters, lr=self.rate, betas=(0.9, 0.99), weight_decay=0.01)
        step, before_s, losses = self._resume(average, optimizer)
        began = saved = time.monotonic()
        while (spent := before_s + time.monotonic() - began) < self.seconds:
            progress = spent / self.seconds
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
            loss = self.loss()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            average.step(parameters)
            losses = [*losses[-99:], loss.detach()]
            if step % 100 == 1:
                print(f"{self.name}: step {step:6d}  loss {loss.item():.4f}  {spent:4.0f} s", flush=True)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                saved = time.monotonic()
                self._save(average, optimizer, step, before_s + saved - began, losses)
        self._save(average, optimizer, step, self.seconds, losses)
        average.copy_to(parameters)
        self.parts.eval().requires_grad_(False)
        return {"steps": step, "seconds": round(self.seconds), "loss": round(_mean(losses), 4)}

    def _resume(self, average: Any, optimizer: Any) -> tuple[int, float, list[Tensor]]:
        file = self.work / f"{self.name}.pt"
        if not file.is_file():
            return 0, 0.0, []
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.parts.load_state_dict(state["parts"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        average.to(device=next(self.parts.parameters()).device)
        print(f"{self.name}: goes on from step {state['step']}", flush=True)
        return state["step"], state["seconds"], [state["loss"]] * 100

    def _save(self, average: Any, optimizer: Any, step: int, seconds: float, losses: Sequence[Tensor]) -> None:
        state = {"parts": self.parts.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"step": step, "seconds": seconds, "loss": torch.tensor(_mean(losses))}
        torch.save(state, self.work / "new.pt")
        (self.work / "new.pt").rename(self.work / f"{self.name}.pt")


def _mean(losses: Sequence[Tensor]) -> float:
    return float(torch.stack([loss.float().cpu() for loss in losses]).mean()) if losses else math.nan


def drawn(chosen: Sequence[Scene], pixels: int, workers: int) -> Tensor:
    """The scenes' pictures, [N, 3, pixels, pixels] uint8, drawn by so many processes."""
    if workers <= 2:  # to start them takes as long as to draw
        pictures = [draw(scene, pixels) for scene in chosen]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            pictures = list(pool.map(partial(draw, pixels=pixels), chosen, chunksize=256))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def as_input(pictures: Tensor) -> Tensor:
    """Pixels 0 to 255 as -1 to 1."""
    return pictures.float() / 127.5 - 1


def vae_loss(vae: Any, pictures: Tensor, batch: int) -> Tensor:
    """Of what the VAE makes of its own latents, which the preview's colors are to fit as well as they can."""
    chosen = as_input(pictures[torch.randint(len(pictures), (batch,), device=pictures.device)])
    with torch.autocast(chosen.device.type, torch.bfloat16):
        posterior = vae.encode(chosen).latent_dist
        made = vae.decode(posterior.sample()).sample
    latents = posterior.mean.float()
    colors = torch.tensor(STABLE_DIFFUSION.weights, device=latents.device)
    preview = torch.einsum("nchw,cr->nrhw", latents / latents.std().detach(), colors)
    away = made.float() - chosen
    colored = 1 + _COLORED * (chosen.amax(1, keepdim=True) - chosen.amin(1, keepdim=True))
    error = ((away.abs() + away.square()) * colored).mean()
    small = F.avg_pool2d(chosen, chosen.shape[-1] // latents.shape[-1])
    loss: Tensor = (
        error + _KL * posterior.kl().float().mean() / latents[0].numel() + _PREVIEW * F.mse_loss(preview, small)
    )
    return loss


@torch.no_grad()
def encoded(vae: Any, pictures: Tensor) -> Tensor:
    """Latents of all pictures; sets the VAE's scaling factor so that they spread by 1."""
    found = torch.cat([vae.encode(as_input(some)).latent_dist.mode() for some in torch.split(pictures, 64)])
    scale = 1 / float(found.std())
    vae.register_to_config(scaling_factor=scale)
    return found * scale


class Denoiser(nn.Module):
    """What is trained together: the UNet and the text encoder.

    Args:
        latents: [N, 4, h, w], scaled.
        ids: [N + 1, tokens] of the captions; the last row is the empty one's.
    """

    def __init__(self, unet: Any, text_encoder: Any, latents: Tensor, ids: Tensor) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self._data = (latents, ids)
        self._noise = image_parts.make_scheduler()

    def loss(self, batch: int) -> Tensor:
        """Mean squared error of the predicted v at random timesteps."""
        latents, ids = self._data
        device = latents.device
        rows = torch.randint(len(latents), (batch,), device=device)
        told = torch.where(torch.rand(batch, device=device) < _UNCONDITIONAL, len(ids) - 1, rows)
        clean = latents[rows]
        noise = torch.randn_like(clean)
        times = torch.randint(1000, (batch,), device=device)
        noisy: Any = self._noise.add_noise(clean, noise, times)
        target: Any = self._noise.get_velocity(clean, noise, times)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # on a CPU it is no quicker
            found = self.unet(noisy, times, self.text_encoder(ids[told])[0]).sample
        return F.mse_loss(found.float(), target)


def paint(pipe: Any) -> list[tuple[str, int, Image.Image]]:
    """Pictures of the 12 prompts with each seed: prompt, seed, picture."""
    asked = list(itertools.product(prompts(), SEEDS))
    pictures = pipe(
        [prompt for prompt, _ in asked],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in asked],
    ).images
    return [(prompt, seed, picture) for (prompt, seed), picture in zip(asked, pictures, strict=True)]


def judgments(made: Sequence[tuple[str, int, Image.Image]]) -> list[dict[str, Any]]:
    """What was seen in each picture, and whether it is right."""

    def judgment(prompt: str, seed: int, seen: Seen) -> dict[str, Any]:
        right = is_right(prompt, seen)
        return {"prompt": prompt, "seed": seed, "color": seen.color, "shape": seen.kind, "right": right}

    return [judgment(prompt, seed, judge(picture)) for prompt, seed, picture in made]


def sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """All pictures on one, row by row."""
    width, height = pictures[0].size
    whole = Image.new("RGB", (width * columns, height * math.ceil(len(pictures) / columns)), "white")
    for place, picture in enumerate(pictures):
        whole.paste(picture, (width * (place % columns), height * (place // columns)))
    return whole


def train(args: argparse.Namespace, sizes: Sizes) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """Draw, train the VAE, then UNet and text encoder; returns the pipeline and what was seen on the way."""
    began = time.monotonic()
    chosen = list(itertools.islice(scenes(args.seed), sizes.pictures))
    pictures = drawn(chosen, sizes.pixels, workers=len(os.sched_getaffinity(0))).to(args.device)
    print(f"{len(chosen)} pictures drawn in {time.monotonic() - began:.0f} s", flush=True)
    told = [scene.caption for scene in chosen] + [""]
    tokenizer = image_parts.make_tokenizer(told)
    ids = tokenizer(told, padding="max_length", return_tensors="pt").input_ids.to(args.device)
    seconds = 60 * args.minutes
    vae: Any = image_parts.make_vae(sizes).to(args.device)
    loss = partial(vae_loss, vae, pictures, sizes.vae_batch)
    facts = {"vae": Stage("vae", vae, loss, sizes.vae_share * seconds, args.vae_rate, args.work).train()}
    latents = encoded(vae, pictures)
    parts: Any = Denoiser(
        image_parts.make_unet(sizes), image_parts.make_text_encoder(sizes, tokenizer), latents, ids
    ).to(args.device)
    loss = partial(parts.loss, sizes.unet_batch)
    facts["unet"] = Stage("unet", parts, loss, (1 - sizes.vae_share) * seconds, args.rate, args.work).train()
    return image_parts.assemble(vae, parts.text_encoder, tokenizer, parts.unet), facts


def finish(args: argparse.Namespace, sizes: Sizes, pipe: Any, facts: dict[str, Any], began: float) -> None:
    """Write the folder with its provenance and the sheet, replacing an older one whole, and print a short table."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as scratch:
        new = Path(scratch) / "new"
        image_parts.save(pipe, new)
        pipe = pipe.to(dtype=torch.float32)  # as it was rounded
        made = paint(pipe)
        found = judgments(made)
        parts = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in _COUNTED}
        known = {
            "made_by": "python -m miinb.demo.train_images",
            "pictures": "miinb/demo/shapes.py, a seeded grammar",
            "license": "MIT",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            **{name: getattr(args, name) for name in ("size", "seed", "minutes", "rate", "vae_rate")},
            "sizes": dataclasses.asdict(sizes),
            "trained": facts,
            "wall_s": round(time.monotonic() - began),
            "hardware": hardware(args.device),
            "parameters": parts,
            "dtype": "float16",
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")},
            "judged_at": {"steps": STEPS, "guidance": GUIDANCE},
            "right": sum(one["right"] for one in found),
            "judgments": found,
        }
        (new / "provenance.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        sheet([picture for _, _, picture in made], 2 * len(SEEDS) * 3).save(new / "sheet.png", optimize=True)
        new.chmod(0o755)
        shutil.rmtree(args.out, ignore_errors=True)
        new.rename(args.out)
    for one in found:
        word = "right" if one["right"] else "WRONG"
        print(f"{one['prompt']:18} seed {one['seed']}  {one['color']:6} {one['shape']:8} {word}")
    print(f"{known['right']} of {len(found)} right; {args.out}: {_bytes(args.out) / 1e6:.1f} MB")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def hardware(device: str) -> str:
    """What it was trained on, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{torch.get_num_threads()} thread(s) of {models[0] if models else platform.machine()}"


def main() -> None:
    """Parse the command line, train, save, judge."""
    parser = argparse.ArgumentParser(prog="python -m miinb.demo.train_images", description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder to write")
    parser.add_argument(
        "--work", type=Path, help="folder of checkpoints, from which it goes on (default: none is kept)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=SIZES, help="default: large on a GPU, small on a CPU")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, without drawing and judging")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of UNet and text encoder")
    parser.add_argument("--vae-rate", type=float, default=2e-3, help="peak learning rate of the VAE")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error("--minutes: more than 0.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use; --device cpu trains the small model.")
    began = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = args.device == "cuda"  # shapes never change
    args.size = args.size or ("large" if args.device == "cuda" else "small")
    sizes = SIZES[args.size]
    with tempfile.TemporaryDirectory() as scratch:
        args.work = (args.work or Path(scratch)) / args.size
        args.work.mkdir(parents=True, exist_ok=True)
        pipe, facts = train(args, sizes)
        finish(args, sizes, pipe, facts, began)


if __name__ == "__main__":
    main()
