"""The check of a UNet and a VAE decoder at start-up: their operators against plain references, on the loaded weights.

The first and last attending blocks and the middle one compute a small picture twice, then the decoder's attention and
its last level do (see `parity`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from miinb.engine.diffusion_spec import BlockSpec
from miinb.engine.image_blocks import Sum
from miinb.engine.parity import TOLERANCE, ParityReport, difference
from miinb.engine.unet import Block, Unet
from miinb.engine.vae import VaeDecoder
from miinb.kernels.dispatch import plain_operators

#: Sides of the activations: both are no multiples of a kernel's tile.
SIDES = (12, 20)
#: Tokens of the two texts.
TOKENS = 77


@torch.inference_mode()
def check(unet: Unet, vae: VaeDecoder) -> ParityReport:
    """Compare the operators with the references on the models' own weights.

    Args:
        unet: on its device.
        vae: on the same one.
    """
    started = time.monotonic()
    worst, where = 0.0, "nowhere"
    for name, compute in (*_unet_parts(unet), *_vae_parts(vae)):
        ours = compute()
        with plain_operators():
            theirs = compute()
        error = difference(ours, theirs)
        if error > worst:
            worst, where = error, name
    return ParityReport(worst, TOLERANCE[unet.weights.dtype], where, time.monotonic() - started)


def _unet_parts(unet: Unet) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    spec, w = unet.spec, unet.weights
    text, times = _random(2, TOKENS, spec.text_width, like=w.conv_in.weight), torch.tensor([981, 1])
    yield "keys and values of the text", lambda: unet.prepare(text, times).text
    yield "shifts of the timesteps", lambda: unet.prepare(text, times).shifts
    with plain_operators():
        conditions = unet.prepare(text, times)
    shift = conditions.shifts[:1]
    pairs = [*zip(spec.down, w.down, strict=True), (spec.mid, w.mid), *zip(spec.up, w.up, strict=True)]
    attending = [pair for pair in pairs if pair[0].heads]
    chosen = {
        pair[0].module: pair for pair in (pairs[0], *attending[:1], (spec.mid, w.mid), *attending[-1:], pairs[-1])
    }
    for block, weights in chosen.values():
        x = _random(2, *SIDES, block.resnets[0][0], like=w.conv_in.weight)
        yield block.module, _layer(unet, block, weights, x, shift, conditions.text)


def _layer(
    unet: Unet, block: BlockSpec, weights: Block, x: Tensor, shift: Tensor, text: Tensor
) -> Callable[[], Tensor]:
    return lambda: unet.layer(block, weights, 0, Sum(x), shift, text).value()


def _vae_parts(vae: VaeDecoder) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    w, last = vae.weights, vae.spec.up[-1]
    middle = _random(1, *SIDES, vae.spec.mid.channels, like=w.conv_in.weight)
    yield "the decoder's attention", lambda: vae.middle(Sum(middle)).value()
    x = _random(1, *SIDES, last.resnets[0][0], like=w.conv_in.weight)
    yield "the decoder's last level", lambda: vae.residual(w.up[-1].resnets[0], Sum(x)).value()


def _random(*shape: int, like: Tensor) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return numbers.to(like.device, like.dtype)
