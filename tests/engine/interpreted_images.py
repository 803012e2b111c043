"""A step of a tiny UNet and a decoding of a tiny VAE by the kernels themselves, under Triton's interpreter.

Run as a program by `test_unet_graphs.py`: prints as JSON how far they are from diffusers' own, and how far a step of
int8 weights is from its plain operators.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import tests.kernels.interpreter  # noqa: F401
from miinb.engine.quantize import Quantizer
from miinb.engine.unet_graphs import GraphedUnet
from miinb.engine.unet_weights import load_unet
from miinb.engine.vae import load_vae
from miinb.kernels.dispatch import plain_operators
from tests.engine import tiny_images
from tests.engine.recomputing import Recomputing


def main(folder: Path) -> None:
    unet = tiny_images.unet("other", layers_per_block=1, transformer_layers_per_block=1)
    vae = tiny_images.vae("two")
    cpu = torch.device("cpu")
    graphed = GraphedUnet(
        load_unet(tiny_images.saved(unet, folder / "unet"), dtype=torch.float32, device=cpu),
        Recomputing(),  # type: ignore[arg-type]
    )
    decoder = load_vae(tiny_images.saved(vae, folder / "vae"), dtype=torch.float32, device=cpu)
    torch.manual_seed(0)
    latents, text, small = torch.randn(1, 9, 3, 4), torch.randn(2, 5, 12), torch.randn(1, 4, 2, 3)
    with torch.inference_mode():
        expected = unet(torch.cat((latents, latents)), 7, text).sample
        picture = vae.decode(small).sample
    conditions = graphed.prepare(text, torch.tensor([900, 7]))
    graphed.capture(1, 3, 4, tokens=5, guided=True)
    out = graphed.step(latents, torch.tensor([1]), conditions)
    distances = [tiny_images.distance(out, expected), tiny_images.distance(decoder.decode(small), picture)]
    rounded = load_unet(folder / "unet", dtype=torch.float32, device=cpu, quantizer=Quantizer(words=True))
    with plain_operators():
        conditions = rounded.prepare(text, torch.tensor([900, 7]))
        expected = rounded.step(latents, torch.tensor([1]), conditions)
    conditions = rounded.prepare(text, torch.tensor([900, 7]))
    distances.append(tiny_images.distance(rounded.step(latents, torch.tensor([1]), conditions), expected))
    print(json.dumps(distances))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
